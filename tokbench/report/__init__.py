"""Tables, plots, findings and pages of finished runs. Never runs a model or imports torch."""

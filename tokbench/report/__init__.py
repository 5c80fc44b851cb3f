"""What a run says: one table of metrics, tables and plots. Reads the store; never runs a model or imports torch."""

"""Models to measure: timm's Vision Transformers with timm's weights or your own, and the bundled one."""

from tokbench.models import lvvit, t2t  # registers them with timm
from tokbench.models.bundled import BUNDLED
from tokbench.models.checkpoints import read_checkpoint
from tokbench.models.hub import HubError
from tokbench.models.loading import OWN_MODULES, REFUSED, VIT_MODULES, load_model, model_names, weights_sha256

"""Methods that look at images before they run: to measure a parameter, or as their FLOPs depend on the image."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokbench.errors import UserError
from tokbench.fusion.core import Method
from tokbench.schedules import Schedule

CALIBRATION_IMAGES = 32
# Of these, how many FLOPs are counted on where they depend on the image: each takes about a second.
COUNTED_IMAGES = 8


def wants_images(method: Method) -> bool:
    """Whether images have to be looked at first."""
    return method.needs_calibration or method.counts_by_image


def calibrate(model: VisionTransformer, method: Method, schedule: Schedule, images: Tensor | None) -> Method:
    """The method with its measured parameters filled in; the method itself when it has none.

    images: (B, C, H, W), preprocessed, on the model's device and in its dtype. Raises UserError when they are needed
    and not there, or there and not needed.
    """
    if not method.needs_calibration:
        if images is not None and not method.counts_by_image:
            raise UserError(f"method '{method.name}' measures nothing with these parameters: it takes no images")
        return method
    if images is None:
        params = ", ".join(f"{name}={value!r}" for name, value in method.parameters().items())
        raise UserError(
            f"method '{method.name}' with {params} measures the model on calibration images; give some as images=…, or "
            "the parameters themselves"
        )
    return method.calibrated(model, schedule, images)

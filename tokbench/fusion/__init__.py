"""Token fusion for timm's Vision Transformers: tensors in, tensors out. Importing it registers every method."""

from tokbench.fusion import (
    atc,
    ats,
    cgsm,
    controls,
    dct,
    diffrate,
    dpcknn,
    evit,
    gtp,
    kmedoids,
    mctf,
    mstm,
    pitome,
    ppt,
    tofu,
    tome,
    vidtldr,
)

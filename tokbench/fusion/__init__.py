"""Token fusion for timm's Vision Transformers: tensors in, tensors out. Importing it registers every method."""

from tokbench.fusion import controls, evit, mctf, mstm, pitome, tofu, tome

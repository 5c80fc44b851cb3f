"""What every fusion method shares: the plan (`Assignment`), the one routine that carries it out, and the registry.

Symbols: B images, N tokens, P prefix tokens, T = N − P patch tokens, M tokens after the reduction, R tokens merged
away, H heads, d channels a head, C channels of the residual stream, s token sizes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from types import ModuleType
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokbench.errors import UserError, nearest, one_line
from tokbench.schedules import Schedule


@dataclass
class Assignment:
    """What becomes of each token of one block. Tokens named in neither `kept` nor `source` are dropped.

    kept: (B, M) long, the input token that each output token continues, in output order.
    source, slot: (B, R) long, tokens merged away, and the output token that each of them joins.
    weight: (B, N), the tokens' weights in the merge; None: `mass`.
    combine: how members of an output token become one: their weighted "mean", their weighted "sum", or "mlerp",
        the direction of their weighted sum with the length of the longest member (ToFu, arXiv 2312.01026, eq. 4).
    sliced: whether `kept` is just the first M tokens, which a slice gives without gathering.
    mass: (B, N), what each token adds to its output's size; None: its size. A source of mass 0 is dropped.
    mix: (B, M−P, R) or (M−P, R), the share of each source that each patch token which stays takes, beside itself times
        its `weight` (None: 1). Sources need then have no `slot`, which only tells where they are, and may be kept too.
    count: (B,) long, how many of the M output tokens each image has, prefix included, where images differ. Those past
        it repeat the last one, and take part in nothing: see `keep_only`.
    """

    kept: Tensor
    source: Tensor | None = None
    slot: Tensor | None = None
    weight: Tensor | None = None
    combine: Literal["mean", "sum", "mlerp"] = "mean"
    sliced: bool = False
    mass: Tensor | None = None
    mix: Tensor | None = None
    count: Tensor | None = None
    _known: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)  # values, and their total

    def require_valid(self, view: View) -> None:
        """Raise UserError unless this can be carried out on the tokens of `view`. Looks at values: not for speed."""
        if not isinstance(self.kept, Tensor) or self.kept.ndim != 2:
            raise UserError("kept must be a tensor (B, M)")
        outputs = self.kept.shape[1]
        if outputs <= view.prefix:
            raise UserError(
                f"kept must hold a patch token beside the {view.prefix} prefix tokens, not {outputs} in all"
            )
        self._require_shapes(view)
        if self.combine not in ("mean", "sum", "mlerp"):
            raise UserError(f"combine is mean, sum or mlerp, not {self.combine!r}")
        if self.combine == "mlerp" and self.mass is not None:
            raise UserError("mlerp goes by the longest member, whatever its mass: give one of the two")
        place = self.places()
        if (place[:, -1] < view.prefix).any() or not torch.equal(self.kept, self.kept.gather(1, place)):
            raise UserError("an image keeps a patch token, and repeats the last one past its count")
        everywhere = torch.arange(outputs, device=view.x.device)
        used = torch.where(place == everywhere, self.kept, -everywhere)
        if self.source is not None and self.mix is None:
            used = torch.cat([used, self.source], dim=1)
        if (used.sort(dim=1).values.diff(dim=1) == 0).any():
            raise UserError("a token can be kept or merged away once only")
        first = everywhere if self.sliced else everywhere[: view.prefix]
        if not torch.equal(self.kept[:, : len(first)], first.expand_as(self.kept[:, : len(first)])):
            promise = "sliced promises that kept is the first tokens"
            raise UserError(promise if self.sliced else "kept must begin with the prefix tokens")

    def _require_shapes(self, view: View) -> None:
        batch, tokens, _ = view.x.shape
        outputs, device = self.kept.shape[1], view.x.device
        _require_index("kept", self.kept, (batch, outputs), tokens, device)
        if self.source is not None or self.slot is not None or self.mix is not None:
            merged = self.source.shape[-1] if isinstance(self.source, Tensor) and self.source.ndim else 0
            _require_index("source", self.source, (batch, merged), tokens, device)
            if self.slot is not None or self.mix is None:
                _require_index("slot", self.slot, (batch, merged), outputs, device)
            if self.mix is not None:
                shape = (outputs - view.prefix, merged)
                _require_numbers("mix", self.mix, shape if self.mix.ndim == 2 else (batch, *shape), device)
        for name, numbers in (("weight", self.weight), ("mass", self.mass)):
            if numbers is not None:
                _require_numbers(name, numbers, (batch, tokens), device)
        if self.count is not None:
            _require_index("count", self.count, (batch,), outputs + 1, device)

    def places(self) -> Tensor:
        """(B, M), the number of each output token, of those past an image's count the last one's before it."""
        batch, outputs = self.kept.shape
        place = torch.arange(outputs, device=self.kept.device).expand(batch, -1)
        return place if self.count is None else place.minimum(self.count.unsqueeze(1) - 1)

    def target(self, tokens: int) -> Tensor:
        """The output token that each of the N input tokens goes to: (B, N) long, −1 where it is dropped."""
        target = self.kept.new_full((self.kept.shape[0], tokens), -1).scatter(1, self.kept, self.places())
        if self.source is None or self.slot is None:
            return target
        slot = self.slot if self.mass is None else torch.where(self.mass.gather(1, self.source) == 0, -1, self.slot)
        return target.scatter(1, self.source, slot)

    def total(self, values: Tensor) -> Tensor:
        """Sum of `values` (B, N) over the members of each output token: (B, M).

        That of the last values is remembered: merging and counting sizes both ask for it.
        """
        if self.source is None or (self.slot is None and self.mix is None):
            return values.gather(1, self.kept)
        if self.mix is None:
            assert self.slot is not None
            if self._known is None or self._known[0] is not values:
                own, others = values.gather(1, self.kept), values.gather(1, self.source)
                self.remember(values, own.scatter_add(1, self.slot, others))
            return self._known[1]  # type: ignore[index]
        own = values if self.weight is None else values * self.weight
        taken = (self.mix * values.gather(1, self.source).unsqueeze(1)).sum(-1)
        return own.gather(1, self.kept) + F.pad(taken, (self.kept.shape[1] - taken.shape[1], 0))

    def remember(self, values: Tensor, total: Tensor) -> None:
        """Have `total` (B, M) be the total of these very values."""
        self._known = values, total


def _require_index(name: str, index: Any, shape: tuple[int, ...], end: int, device: torch.device) -> None:
    if not isinstance(index, Tensor) or index.dtype != torch.long or index.device != device:
        found = f"{index.dtype} on {index.device}" if isinstance(index, Tensor) else repr(index)
        raise UserError(f"{name} must be a tensor of torch.long on {device}, not {found}")
    if tuple(index.shape) != shape:
        raise UserError(f"{name} must have shape {shape}, not {tuple(index.shape)}")
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < end:
        raise UserError(f"{name} holds {int(index.min())} to {int(index.max())}; there are {end}, counted from 0")


def _require_numbers(name: str, numbers: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(numbers.shape) != shape or numbers.device != device:
        raise UserError(f"{name} must be {shape} on {device}, not {tuple(numbers.shape)}")


def merge(x: Tensor, plan: Assignment, size: Tensor | None, kernels: ModuleType | None = None) -> Tensor:
    """Carry out `plan` on the tokens x: (B, N, C) → (B, M, C). Tokens that nothing joins are passed on bit for bit.

    size: (B, N) token sizes, None where all are 1. kernels: of fusion/kernels, that may do it.
    """
    if plan.mix is not None:
        return _mix(x, plan)
    if plan.source is None or plan.slot is None:
        return x[:, : plan.kept.shape[1]] if plan.sliced else pick(x, plan.kept)
    weight = next((one for one in (plan.weight, plan.mass, size) if one is not None), None)
    if weight is None:
        weight = torch.ones(x.shape[:2], dtype=score_dtype(x), device=x.device)
    counted = next((one for one in (plan.mass, size) if one is not None), weight)
    if kernels is not None and plan.combine != "sum" and _fits(kernels, x, plan, weight, counted):
        merged, total = kernels.join(x, plan.kept, plan.source, plan.slot, weight, counted, plan.combine == "mlerp")
        plan.remember(counted, total)
        return merged
    kept = x[:, : plan.kept.shape[1]] if plan.sliced else pick(x, plan.kept)
    others, total = weight.gather(1, plan.source), plan.total(weight)
    sources = pick(x, plan.source)
    if plan.combine == "sum":
        joined = kept * weight.gather(1, plan.kept).unsqueeze(-1).to(x.dtype)
        return joined.scatter_add_(1, wide(plan.slot, x), sources * others.unsqueeze(-1).to(x.dtype))
    # Shares of a mean sum to 1: each source moves its token by its share of the way between them. Only tokens that are
    # joined are computed, and no intermediate is larger than a token, so float16 can't overflow here.
    share = (others / total.gather(1, plan.slot)).unsqueeze(-1).to(x.dtype)
    step = sources * share - pick(kept, plan.slot) * share
    if plan.combine == "mlerp":
        return _lengthen(kept.scatter_add(1, wide(plan.slot, x), step), kept, sources, plan.slot)
    return (kept.clone() if plan.sliced else kept).scatter_add_(1, wide(plan.slot, x), step)


def _fits(kernels: ModuleType, x: Tensor, plan: Assignment, *numbers: Tensor) -> bool:
    """Whether `join` may be given these tensors. What it reads it takes for what it should be; PyTorch looks."""
    index = plan.kept, plan.source, plan.slot
    return (
        x.dtype in kernels.DTYPES
        and all(one.dtype == torch.float32 and one.shape == x.shape[:2] for one in numbers)
        and all(one.dtype == torch.long and len(one) == len(x) for one in index)  # type: ignore[union-attr, arg-type]
        and plan.source.shape == plan.slot.shape  # type: ignore[union-attr]
        and all(one.device == x.device for one in (*index, *numbers))  # type: ignore[union-attr]
    )


def _mix(x: Tensor, plan: Assignment) -> Tensor:
    """`merge` where sources spread over many tokens."""
    assert plan.mix is not None and plan.source is not None
    kept = pick(x, plan.kept)
    if plan.weight is not None:
        kept = kept * plan.weight.gather(1, plan.kept).unsqueeze(-1).to(x.dtype)
    taken = plan.mix.to(x.dtype) @ pick(x, plan.source)
    return kept + F.pad(taken, (0, 0, kept.shape[1] - taken.shape[1], 0))


def _lengthen(joined: Tensor, kept: Tensor, sources: Tensor, slot: Tensor) -> Tensor:
    """Give each merged token the norm of its longest member; leave the others alone."""
    precise = score_dtype(joined)
    longest = kept.to(precise).norm(dim=-1)
    longest = longest.scatter_reduce(1, slot, sources.to(precise).norm(dim=-1), "amax")
    merged = torch.zeros_like(longest).scatter(1, slot, 1.0) > 0
    # Two steps, of which neither leaves float16's range; tokens that cancel out stay 0, for they have no direction.
    direction = F.normalize(joined.to(precise), dim=-1, eps=torch.finfo(precise).tiny)
    return torch.where(merged.unsqueeze(-1), (direction * longest.unsqueeze(-1)).to(joined.dtype), kept)


def wide(index: Tensor, x: Tensor) -> Tensor:
    """An index (B, M) repeated over the channels of x (B, N, C), for gather and scatter."""
    return index.unsqueeze(-1).expand(-1, -1, x.shape[-1])


def pick(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x (B, N, C) at index (B, M): (B, M, C)."""
    if x.device.type != "cpu":
        return x.gather(1, wide(index, x))
    # On the CPU, gathering looks the index up for every channel; whole rows of one long list come ten times as fast.
    batch, tokens, channels = x.shape
    first = torch.arange(0, batch * tokens, tokens).unsqueeze(1)
    return x.reshape(-1, channels).index_select(0, (index + first).flatten()).unflatten(0, index.shape)


def constant(most: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator of what makes a tensor that no image has a part in: the last `most` are kept for later passes."""

    def decorate(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        kept = lru_cache(maxsize=most)(make)

        @torch.compiler.assume_constant_result
        @wraps(make)
        def get(*key: Any) -> Tensor:
            # What a trace makes is part of its graph, and while a model is exported no real tensor: later passes must
            # not find it.
            return (make if torch.compiler.is_exporting() or torch.jit.is_tracing() else kept)(*key)

        return get

    return decorate


def score_dtype(x: Tensor) -> torch.dtype:
    """Scores, sizes and weights are float32 at least, float64 for float64 models."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass
class View:
    """What a method may look at in one block. Everything costly is computed when asked for.

    x: (B, N, C) residual stream: `prefix` tokens, then `patches`. queries, keys, which `heads` gives: (B, H, N, d) of
    this block's attention, after any q/k norm and before any rotation; keys may have fewer heads, each shared by
    several of the queries'. values() are (B, H, N, d); projected anew, but for methods that set `needs_values`. rotate:
    what a rotary model does to queries or keys before it compares them. bias() is what the model adds to the logits for
    where tokens are, (B or 1, H, N, N) or (H, N, N). size: (B, N), None where all are 1; log_size: (B, N) where the
    block's attention uses it. block counts from 0. token_map: (B, N₀), where each of the model's first tokens is now,
    −1 dropped; only for methods that set `needs_map`. grid: (rows, columns) of patches at the start. begun: what the
    method's `begin` gave. Methods that set `counts_by_image` find images filled up (`padded`) with tokens of size 0,
    and in `nominal` the patch tokens there would be if each block had removed what was asked for. fixed: shapes
    cannot depend on what images show, for the model is compiled, exported or traced; all images then get the most that
    may be left. fused: whether shortcuts may stand in for definitions.
    """

    x: Tensor
    prefix: int
    patches: int
    block: int
    depth: int
    heads: Callable[[], tuple[Tensor, Tensor]]
    values: Callable[[], Tensor]
    scale: float
    has_class_token: bool
    grid: tuple[int, int]
    size: Tensor | None = None
    log_size: Tensor | None = None
    rotate: Callable[[Tensor], Tensor] | None = None
    bias: Callable[[], Tensor] | None = None
    token_map: Tensor | None = None
    begun: Any = None
    nominal: int = 0
    padded: bool = False
    fixed: bool = False
    kernels: ModuleType | None = None
    _heads: tuple[Tensor, Tensor] | None = None
    _attention: Tensor | None = None
    _received: Tensor | None = None

    @property
    def queries(self) -> Tensor:
        return self._projected()[0]

    @property
    def keys(self) -> Tensor:
        return self._projected()[1]

    def _projected(self) -> tuple[Tensor, Tensor]:
        if self._heads is None:
            self._heads = self.heads()
        return self._heads

    def kernel(self, name: str, *tensors: Tensor) -> Callable[..., Any] | None:
        """The kernel of that name for these tensors, None where the definition has to do."""
        if self.kernels is None or any(one.dtype not in self.kernels.DTYPES for one in tensors):
            return None
        return getattr(self.kernels, name, None)

    def mean_keys(self) -> Tensor:
        """k̄: keys averaged over heads, (B, N, d), float32 at least."""
        if mean := self.kernel("mean_heads", self.keys):
            return mean(self.keys)
        return self.keys.mean(1, dtype=score_dtype(self.keys))

    def match(self, metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
        """`bipartite_match` of these tokens by a metric (B, N, D). No more go than set A has."""
        r = min(r, (self.patches + 1 - self.prefix % 2) // 2)
        return (self.kernel("match", metric) or bipartite_match)(metric, self.prefix, r)

    def attention(self) -> Tensor:
        """A = softmax(Q Kᵀ/√d, + log s and a position bias where the block uses them): (B, H, N, N), computed once."""
        if self._attention is None:
            softmax = self.kernel("softmax", self.queries, self.keys) if self.bias is None else None
            if softmax is None:
                self._attention = self._rows(self._rotated(self.queries), self.log_size)
            else:
                keys = for_every_head(self._rotated(self.keys), self.queries.shape[1])
                logits = self._rotated(self.queries) @ keys.mT
                self._attention, self._received = softmax(logits, self.scale, self.log_size)
        return self._attention

    def received(self) -> Tensor:
        """Attention that each token receives, mean over heads and queries of A: (B, N)."""
        attention = self.attention()
        return attention.mean((1, 2)) if self._received is None else self._received

    def plain_attention(self) -> Tensor:
        """softmax(Q Kᵀ/√d), without log s even where the block uses it: (B, H, N, N)."""
        return self.attention() if self.log_size is None else self._rows(self._rotated(self.queries), None)

    def attend_with(self, attention: Tensor) -> None:
        """Have `attention` (B, H, N, N) be the A of this block."""
        self._attention, self._received = attention, None

    def _rotated(self, heads: Tensor) -> Tensor:
        return heads if self.rotate is None else self.rotate(heads)

    def _rows(self, queries: Tensor, log_size: Tensor | None) -> Tensor:
        precise = score_dtype(self.keys)
        keys = for_every_head(self._rotated(self.keys), queries.shape[1])
        logits = (queries.to(precise) * self.scale) @ keys.to(precise).mT
        if self.bias is not None:
            logits += self.bias()[..., : queries.shape[2], :]
        if log_size is not None:
            logits += log_size[:, None, None, :]
        return logits.softmax(-1)

    def class_attention(self) -> Tensor:
        """Attention that each token gets from the class token, mean over heads: (B, N).

        Without a class token: the attention it receives, mean over heads and queries.
        """
        if not self.has_class_token and not self.padded:
            return self.received()
        return self.class_rows().mean((1, 2))

    def class_rows(self) -> Tensor:
        """The rows of A that `class_attention` is the mean of: (B, H, 1, N), or (B, H, N, N) without a class token."""
        if self.has_class_token:
            return self._rows(self.queries[:, :, :1], self.log_size)  # prefix tokens are not rotated
        if not self.padded or self.size is None:
            return self.attention()
        real = (self.size > 0).to(self.size.dtype)
        return self.attention() * (real / real.mean(1, keepdim=True))[:, None, :, None]


def for_every_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values x (B, H', N, d) for each of H query heads, of which H/H' share one: (B, H, N, d)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


class Method:
    """A fusion method. Subclass it as a frozen dataclass: its fields are the method's parameters.

    `plan` is all a method has to write; it is called for the blocks in which the schedule removes something.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    proportional: bool = False  # add log s to the attention logits once anything has merged
    place: Literal["start", "middle", "end"] = "middle"  # of a block: before norm1, before the MLP, or after it
    reuses_attention: bool = False  # at "start": attend with the matrix the plan was made by, reduced
    reshapes_attention: bool = False  # at "middle": attend with what `reshape_attention` makes of A
    tracks_size: bool = True
    pools_by_size: ClassVar[bool] = True  # average and attention pooling weight tokens by their sizes
    counts_by_image: ClassVar[bool] = False  # how many tokens stay depends on the image: plans have a `count`
    needs_map: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False
    speed_only: ClassVar[bool] = False  # never an accuracy row
    flops_shape: ClassVar[Literal["constant", "keep"]] = "constant"  # which schedule `flops:` scales

    def acts_in(self, block: int, depth: int) -> bool:
        """Whether the method ever removes anything in this block."""
        return True

    def require_depth(self, depth: int) -> None:
        """Raise UserError if a parameter names a block that a model of `depth` blocks does not have."""

    def limit(self, patches: int, prefix: int) -> int:
        """The most tokens that may be removed from T = `patches` patch tokens. At least one must remain."""
        return patches - 1

    def begin(self, x: Tensor, prefix: int, grid: tuple[int, int]) -> Any:
        """What every plan of one forward pass may look at as `view.begun`, from the tokens x (B, N₀, C) of block 0."""
        return None

    def reshape_attention(self, attention: Tensor) -> Tensor:
        """What a block that removes tokens attends with instead of A (B, H, N, N)."""
        return attention

    @property
    def needs_calibration(self) -> bool:
        """Whether a parameter has to be measured on images before the method can run; see `calibrated`."""
        return False

    def countable(self) -> Method:
        """A method with the same FLOPs that needs no calibration."""
        return self

    def calibrated(self, model: VisionTransformer, schedule: Schedule, images: Tensor) -> Method:
        """The method with every parameter measured on images (B, C, H, W), which the model is shown as it is."""
        raise NotImplementedError

    def plan(self, view: View, r: int) -> Assignment:
        """Choose what becomes of each token when r are to go, 1 ≤ r ≤ `limit`."""
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """The method's parameters by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]


PLACES = ("start", "middle", "end")
METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register_method(method: M) -> M:
    """Class decorator: make a method known under its `name`, to `apply`, the grid and the command line.

    Raises UserError for what is no subclass of Method, a name that another module's method has, or one that is no
    plain word.
    """
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise UserError(f"{getattr(method, '__name__', method)!r} is no method: it must inherit from Method")
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", str(getattr(method, "name", ""))):
        raise UserError(f"{method.__name__}.name must be a plain word such as 'my_method': lower case, digits, - and _")
    taken = METHODS.get(method.name)
    if method.name == "none" or (taken is not None and taken.__module__ != method.__module__):
        raise UserError(f"there is a method '{method.name}' already; give {method.__name__} another name")
    METHODS[method.name] = method
    return method


def make_method(name: str, **params: Any) -> Method:
    """A method by name with its parameters.

    Raises UserError for a name, parameter or type that does not exist, and for a method that cannot be made of them.
    """
    if name not in METHODS:
        known = ["none", *METHODS]
        names = f"{', '.join(known)}, and those of a --plugin file"
        raise UserError(f"unknown method '{name}'; the methods are {names}.{nearest(name, known)}")
    if not dataclasses.is_dataclass(METHODS[name]):
        raise UserError(f"method '{name}': put @dataclass(frozen=True) right above class {METHODS[name].__name__}")
    fields = {f.name: f.default for f in dataclasses.fields(METHODS[name])}  # type: ignore[arg-type]
    params = {key: tuple(value) if isinstance(value, list) else value for key, value in params.items()}
    for key, value in params.items():
        if key not in fields:
            has = ", ".join(f"{k}={v!r}" for k, v in fields.items()) or "none"
            raise UserError(f"method '{name}' has no parameter '{key}'; it has: {has}.{nearest(key, fields)}")
        check = getattr(METHODS[name], "check_" + key, _same_type)
        if expected := _call(f"method '{name}': check_{key}({value!r})", check, value, fields[key]):
            raise UserError(f"method '{name}': {key}={value!r} cannot be; {key} is {expected}")
    made: Method = _call(f"method '{name}' with {params or 'no parameters'}", METHODS[name], **params)
    for attribute, words in (("place", PLACES), ("flops_shape", ("constant", "keep"))):
        if (word := getattr(made, attribute, None)) not in words:
            raise UserError(f"method '{name}': {attribute} is one of {', '.join(words)}, not {word!r}")
    return made


def _call(what: str, function: Callable[..., Any], *values: Any, **named: Any) -> Any:
    """What somebody's own code gives. Raises UserError where it fails or exits: it must not end a command as if all
    were well."""
    try:
        return function(*values, **named)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserError(f"{what} failed: {one_line(error)}") from error


def _same_type(value: Any, default: Any) -> str:
    """What a value must be, "" if it is that: of the default's type."""
    if isinstance(default, float):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return "" if number else "a number"
    if isinstance(value, type(default)) and isinstance(value, bool) == isinstance(default, bool):
        return ""
    return {bool: "true or false", int: "a whole number", str: "a word"}.get(type(default), f"like {default!r}")


def one_of(*words: str) -> Callable[[object, object], str]:
    """A check for a parameter that is one of these words: `check_form = staticmethod(one_of("wide", "deep"))`."""
    return lambda value, default: "" if value in words else f"{', '.join(words[:-1])} or {words[-1]}"


def whole(least: int) -> Callable[[object, object], str]:
    """A check for a parameter that is a whole number."""

    def check(value: object, default: object) -> str:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return "" if fits else f"a whole number, {least} or more"

    return check


def attend(attention: Tensor, values: Tensor) -> Tensor:
    """What attending by A (B, H, N, N) gives for values (B, H, N, d): (B, N, H·d)."""
    return (attention.to(values.dtype) @ values).transpose(1, 2).flatten(2)


def attend_reduced(attention: Tensor, plan: Assignment, size: Tensor | None, values: Tensor) -> Tensor:
    """What attending by A (B, H, N, N) gives after a merge, for values (B, H, M, d): (B, M, H·d)."""
    return attend(reduce_attention(attention, plan, size), values)


def attend_merged(
    attention: Tensor, plan: Assignment, size: Tensor | None, values: Tensor, kernels: ModuleType | None = None
) -> Tensor:
    """The same as `attend_reduced`, which reads and writes A twice more.

    A sum of columns times a value is each column times that value; rows of a product are averaged as those of A are.
    """
    tokens = attention.shape[-1]
    plain = plan.source is not None and plan.kept.shape[1] + plan.source.shape[1] == tokens and plan.combine != "mlerp"
    if not plain:
        return attend_reduced(attention, plan, size, values)
    spread = pick(values.transpose(1, 2).flatten(2), plan.target(tokens))
    return merge(attend(attention, spread.unflatten(2, (len(values[0]), -1)).transpose(1, 2)), plan, size, kernels)


def reduce_attention(attention: Tensor, plan: Assignment, size: Tensor | None) -> Tensor:
    """An attention matrix (B, H, N, N) after a merge: rows are averaged as tokens are, columns summed. (B, H, M, M)."""
    batch, heads, _, _ = attention.shape

    def each(of_image: Tensor | None) -> Tensor | None:
        return None if of_image is None else of_image.repeat_interleave(heads, 0)

    # Every head as an image of its own: the rows that are picked lie in one piece.
    kept, source, slot = plan.kept.repeat_interleave(heads, 0), each(plan.source), each(plan.slot)
    rows = merge(attention.flatten(0, 1), Assignment(kept, source, slot, each(plan.weight), plan.combine), each(size))
    reduced = rows.gather(2, _for_every_row(kept, rows))
    if source is not None and slot is not None:
        reduced.scatter_add_(2, _for_every_row(slot, rows), rows.gather(2, _for_every_row(source, rows)))
    return reduced.unflatten(0, (batch, heads))


def _for_every_row(columns: Tensor, rows: Tensor) -> Tensor:
    """Column numbers (B, R) repeated for each of the rows (B, M, N): (B, M, R)."""
    return columns.unsqueeze(1).expand(-1, rows.shape[1], -1)


@dataclass
class State:
    """What one forward pass carries from block to block."""

    size: Tensor | None = None  # (B, N), None while every token is one patch
    log_size: Tensor | None = None  # of these sizes, where it was asked for
    token_map: Tensor | None = None  # (B, N₀), kept when traced or when the method needs it
    positional: bool = False  # whether attention looks at where tokens are: rotary embeddings, or a position bias
    origin: Tensor | None = None  # (B, N), the first token whose place each one has, None for its own
    tokens: list[int | Tensor] = field(default_factory=list)  # after each block, prefix included; (B,) by image
    count: Tensor | None = None  # (B,), once images differ
    nominal: int | None = None  # tokens if all were removed that were asked for, where images differ
    begun: Any = None  # what the method's `begin` gave

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which torch refuses to make of a tensor that gradients flow through, as they do to sizes."""
        return {name: one.detach() if isinstance(one, Tensor) else one for name, one in vars(self).items()}

    def carry_out(self, plan: Assignment, x: Tensor, tracks_size: bool, kernels: ModuleType | None = None) -> Tensor:
        """The tokens x (B, N, C) after a plan, (B, M, C); sizes and map are brought up to date with it."""
        tokens, grows = int(x.shape[1]), tracks_size and plan.source is not None
        if self.size is None and (grows or plan.count is not None):
            self.size = torch.ones(x.shape[:2], dtype=score_dtype(x), device=x.device)
        merged, size = merge(x, plan, self.size, kernels), self.size
        if size is not None:
            if not grows:
                size = size.gather(1, plan.kept)
            elif plan.mass is None:
                size = plan.total(size)
            else:
                size = plan.total(plan.mass).clamp_min(1e-6)  # masses may be negative, the logarithm of a size not
            if plan.count is not None:
                past = torch.arange(plan.kept.shape[1], device=plan.kept.device) >= plan.count.unsqueeze(1)
                size = size.masked_fill(past, 0)
        self.size, self.count, self.log_size = size, plan.count, None
        if self.positional:
            self.origin = plan.kept if self.origin is None else self.origin.gather(1, plan.kept)
        if self.token_map is not None:
            moved = plan.target(tokens).gather(1, self.token_map.clamp_min(0))
            self.token_map = torch.where(self.token_map < 0, -1, moved)
        return merged


def first_of_sets(prefix: int) -> tuple[int, int]:
    """Where ToMe's sets A and B begin: the first even and odd positions past the prefix. Each has every other token."""
    return prefix + prefix % 2, prefix + 1 - prefix % 2


def two_sets(x: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Tokens x (B, N, …) in ToMe's sets A and B."""
    a, b = first_of_sets(prefix)
    return x[:, a::2], x[:, b::2]


def best_proposals(score: Tensor, prefix: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each token of A proposes to its best token of B, and the r best proposals go.

    score: (B, |A|, |B|), of the tokens in `two_sets`.
    Returns kept: (B, N−r) in the order prefix, A ascending, B ascending; source: (B, r); slot: (B, r).
    """
    best, partner = score.max(-1)
    ranked = best.argsort(dim=-1, descending=True, stable=True)
    going, staying = ranked[:, :r], ranked[:, r:].sort(dim=-1).values
    a, b = first_of_sets(prefix)
    all_of_b = torch.arange(b, b + 2 * score.shape[2], 2, device=score.device)
    kept = after_prefix(prefix, a + 2 * staying, all_of_b.expand(staying.shape[0], -1))
    return kept, a + 2 * going, prefix + staying.shape[1] + partner.gather(1, going)


def bipartite_match(metric: Tensor, prefix: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching (ToMe, arXiv 2210.09461, section 3): the r most cosine-similar pairs across two sets.

    metric: (B, N, D). Returns what `best_proposals` does.
    """
    a, b = two_sets(F.normalize(metric, dim=-1), prefix)
    return best_proposals(a @ b.mT, prefix, r)


def distances(x: Tensor) -> Tensor:
    """‖x_i − x_j‖ between tokens x (B, T, C): (B, T, T), 0 from each to itself, float32 at least."""
    x = x.to(score_dtype(x))
    x = x - x.mean(1, keepdim=True)  # small numbers cancel to less than large ones
    length = x.square().sum(-1)
    squared = length.unsqueeze(2) + length.unsqueeze(1) - 2 * (x @ x.mT)
    return both_ways_alike(squared, alone=0).clamp_min(0).sqrt()


def both_ways_alike(scores: Tensor, alone: float) -> Tensor:
    """Scores (B, T, T) of pairs of tokens, the same for both orders, and `alone` for a token with itself.

    A product of matrices may give the two in different last bits, where a method relies on ties: the two tokens of a
    mutually nearest pair have the same best score.
    """
    below = scores.tril(-1)
    diagonal = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    return (below + below.mT).masked_fill(diagonal, alone)


def between(scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Some of the scores (B, T, T') of pairs: (B, R, K) for rows (B, R) and columns (B, K)."""
    return pick(scores, rows).gather(2, columns.unsqueeze(1).expand(-1, rows.shape[1], -1))


def chosen_first(chosen: Tensor) -> Tensor:
    """Token numbers, those of which `chosen` (B, T) is true first, each part ascending: (B, T)."""
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)


def inverse(order: Tensor) -> Tensor:
    """The place of each token in an order (B, T) of them: (B, T)."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)


def after_prefix(prefix: int, *tokens: Tensor) -> Tensor:
    """(B, prefix + Σ n) what a plan keeps: the prefix tokens, which always stay, and then `tokens`, each (B, n)."""
    first = torch.arange(prefix, device=tokens[0].device).expand(tokens[0].shape[0], -1)
    return torch.cat([first, *tokens], dim=1)


def keep_only(patches: Tensor, prefix: int, count: Tensor | None = None) -> Assignment:
    """A plan that drops all but the prefix and the patch tokens numbered by `patches` (B, K), counted from 0.

    count: (B,), how many of the K each image keeps, 1 at least; None: all.
    """
    plan = Assignment(after_prefix(prefix, patches + prefix))
    if count is not None:
        plan.count = prefix + count
        plan.kept = plan.kept.gather(1, plan.places())
    return plan

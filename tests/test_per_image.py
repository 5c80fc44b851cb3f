"""Methods against plain loops over one image's tokens, written from the methods' definitions alone.

What the reference outputs do not have is here: rotary embeddings of every kind, shared keys, a distillation token,
class attention without a class token, average and attention pooling of merged tokens.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from survey import coverage
from timm.models.beit import Beit
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import ResPostBlock

import tokbench
from tokbench.fusion.anatomy import has_class_token
from tokbench.measure._model import resolve_input_size

POST_NORM = "an Eva with post-norm blocks and rotary embeddings"
MODELS = [
    "eva02_tiny_patch14_224",  # rotation of neighbours, biases apart, average pooling
    "eva02_base_patch16_clip_224",  # separate q, k, v; normed attention
    "vit_small_patch16_dinov3_qkvb",  # rotation of halves, registers
    "vit_large_patch16_sapiens2",  # keys shared by queries, q/k norm
    "vit_small_patch16_rope_mixed_224",  # a rotation for every head and block
    "vit_medium_patch16_rope_reg1_gap_256",  # no class token
    "vit_pe_core_tiny_patch16_384",  # attention pooling of all tokens
    POST_NORM,
    "deit_tiny_distilled_patch16_224",
    "vit_base_patch16_siglip_224",  # no class token, attention pooling
    "vit_wee_patch16_reg1_gap_256",  # a register and no class token, average pooling, LayerScale
    "test_vit3",  # attention pooling of all tokens, a register among them
    "beit_base_patch16_224",  # a bias for where tokens are, average pooling
    "naflexvit_base_patch16_gap",  # registers and no class token, average pooling
]
RUNS = {
    "tome": ("tome", "list:9,7,5", {}),
    "tofu": ("tofu", "list:9,7,5", {"prune_blocks": 1}),
    "mctf": ("mctf", "list:9,7,5", {}),
    "mctf precise": ("mctf", "list:9,7,5", {"one_step_ahead": "precise"}),
    "mctf off": ("mctf", "list:9,7,5", {"one_step_ahead": "off"}),
    "mctf one way": ("mctf", "list:9,7,5", {"bidirectional": False}),
    "mctf one way, precise": ("mctf", "list:9,7,5", {"bidirectional": False, "one_step_ahead": "precise"}),
    "mctf one way, off": ("mctf", "list:9,7,5", {"bidirectional": False, "one_step_ahead": "off"}),
    "mstm": ("mstm", "list:9,7,5", {}),
    "evit": ("evit", "list:9,7,5", {}),
    "pitome": ("pitome", "list:9,7,5", {}),
    "pitome early": ("pitome", "list:9,7", {}),  # its later blocks order tokens anew
    "topk": ("topk", "list:9,7,5", {}),
    "random": ("random", "list:9,7,5", {"seed": 3}),
    "diffrate": ("diffrate", "list:9,7,5", {"prune": 0.35}),
    "ppt": ("ppt", "list:9,7,5", {"tau": 3e-4}),
    "atc": ("atc", "list:9,7,5", {"linkage": "average"}),
    "cgsm": ("cgsm", "list:9,7,5", {}),
    "vidtldr": ("vidtldr", "list:9,7,5", {}),
    "gtp": ("gtp", "list:9,7,5", {"alpha": 0.3, "sparsity": 0.8}),
    "dpcknn": ("dpcknn", "list:9,7,5", {}),
    "kmedoids": ("kmedoids", "list:9,7,5", {}),
    "ats": ("ats", "list:9,7,5", {"form": "midpoints"}),
    "ats released": ("ats", "list:1,0,1", {"form": "released"}),
    "dct": ("dct", "list:9,7,5", {}),
}


@functools.cache
def build(name: str):
    with torch.random.fork_rng(devices=[]):  # the images are the same whether a model was built before or is now
        torch.manual_seed(0)
        if name != POST_NORM:
            return coverage.build_small(name).double()
        model = Eva(
            img_size=48, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=7, global_pool="token",
            use_post_norm=True, use_rot_pos_emb=True,
        ).eval()  # fmt: skip
        for parameter in model.blocks.parameters():
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        return model.double()


def _cases() -> list[Any]:
    """Every run on the first model, and a third of them on each of the others, by turns; the rest is slow."""
    return [
        pytest.param(name, run, marks=() if model == 0 or (model + turn) % 3 == 0 else pytest.mark.slow)
        for model, name in enumerate(MODELS)
        for turn, run in enumerate(RUNS)
    ]


@pytest.mark.parametrize(("name", "run"), _cases())
def test_a_method_is_what_its_definition_says(name, run):
    model, (method, schedule, params) = build(name), RUNS[run]
    images = torch.rand(2, *resolve_input_size(model, None), dtype=torch.float64)
    asked = [int(number) for number in schedule.removeprefix("list:").split(",")]
    removals = asked + [0] * (len(model.blocks) - len(asked))
    with torch.inference_mode():
        loops = [Loops(model, method, params, removals)(image) for image in images]
        tokbench.apply(model, method, schedule, trace=True, **params)
        torch.testing.assert_close(model(images), torch.stack([logits for logits, _ in loops]), rtol=0, atol=1e-9)
    assert tokbench.token_map(model).tolist() == [where for _, where in loops]
    tokbench.remove(model)


@pytest.mark.parametrize("name", MODELS)
def test_the_loops_are_timms_model_when_nothing_is_removed(name):
    model = build(name)
    image = torch.rand(*resolve_input_size(model, None), dtype=torch.float64)
    with torch.inference_mode():
        logits, where = Loops(model, "none", {}, [0] * 4)(image)
        torch.testing.assert_close(logits, model(image[None])[0], rtol=0, atol=1e-9)
    assert where == list(range(coverage.SIDE**2 + model.num_prefix_tokens))


class Loops:
    """One image's forward pass. Tokens are rows of `x`; `size`, `place` and `where` are plain lists."""

    def __init__(self, model, method, params, removals):
        self.model, self.method, self.params, self.removals = model, method, params, removals
        self.prefix = model.num_prefix_tokens
        self.instead, self.mass, self.taken = None, None, {}
        sized = ("tome", "tofu", "mctf", "mstm", "diffrate", "ppt", "atc", "cgsm", "vidtldr", "gtp")
        self.weighs_size = method in sized
        self.tracks_size = self.weighs_size or method in ("pitome", "dpcknn", "kmedoids")

    def __call__(self, image):
        model = self.model
        table = None
        if isinstance(model, Beit):
            self.x = torch.cat([model.cls_token[0], model.patch_embed(image[None])[0]])
        elif isinstance(model, NaFlexVit):
            self.x = model.norm_pre(model.embeds(image[None])[0])[0]
        else:
            embedded = model._pos_embed(model.patch_embed(image[None]))
            x, table = embedded if isinstance(embedded, tuple) else (embedded, None)
            self.x = model.norm_pre(x)[0]
        count = self.nominal = len(self.x)
        self.first = self.x
        self.size = [1.0] * count
        self.place = list(range(count))  # the first token whose place, for rotation or bias, a token has
        self.where = list(range(count))  # where each first token is now
        for number, block in enumerate(model.blocks):
            self.block, self.number, self.attention = block, number, block.attn
            self.table = None if table is None else table[number] if getattr(model, "rope_mixed", False) else table
            self.run_block(self.removals[number])
        return self.head(), self.where

    def run_block(self, r):
        mode = self.params.get("one_step_ahead", "approximate")
        at_start = self.method == "mctf" and mode != "off"
        at_end = self.method in ("kmedoids", "dct")
        if self.method == "dpcknn" and r:
            self.regroup(*self.dpcknn(r))
        r = 0 if self.method == "mctf" and self.number == 0 else r
        matrices = None
        if at_start and r:
            ahead = self.matrices()
            groups, weights = self.mctf(r, ahead)
            if mode == "approximate":
                matrices = [self.reduced(matrix, groups, weights) for matrix in ahead]
            self.regroup(groups, weights)
        normed = self.before_attention()
        used = self.matrices() if matrices is None else matrices
        if self.method == "gtp" and r:
            used = [self.largest(matrix) for matrix in used]
        self.used, self.normed = used, normed
        keys = self.heads(normed, "k")
        importance = self.importance(used)
        self.before = self.matrices(sized=False) if self.method == "vidtldr" else None
        attended = self.x + self.branch(self.out(normed, used), 1)
        if r and self.method not in ("mctf", "none", "dpcknn") and not at_end:
            self.x = attended
            self.regroup(*getattr(self, self.method)(r, sum(keys) / len(keys), importance))
            attended = self.x
        self.x = attended
        self.x = self.x + self.branch(self.block.mlp(self.x if self.post_norm() else self.block.norm2(self.x)), 2)
        if r and self.method == "mctf" and mode == "off":
            self.regroup(*self.mctf(r, used))
        if r and at_end:
            self.regroup(*getattr(self, self.method)(r, None, importance))
        self.nominal -= r

    # The transformer

    def post_norm(self):
        return isinstance(self.block, (EvaBlockPostNorm, ResPostBlock))

    def before_attention(self):
        return self.x if self.post_norm() else self.block.norm1(self.x)

    def branch(self, out, which):
        if self.post_norm():
            return getattr(self.block, f"norm{which}")(out)
        gamma = getattr(self.block, f"gamma_{which}", None)
        if gamma is not None:
            return gamma * out
        return getattr(self.block, f"ls{which}", lambda same: same)(out)

    def heads(self, normed, which):
        """The queries, keys or values of every head, each (N, d), before any rotation."""
        attention = self.attention
        if attention.qkv is None:
            out = getattr(attention, f"{which}_proj")(normed)
        else:
            out = attention.qkv(normed).chunk(3, dim=-1)["qkv".index(which)]
            if which != "k" and getattr(attention, "q_bias", None) is not None:
                out = out + getattr(attention, f"{which}_bias")
        parts = out.split(self.head_dim(), dim=-1)
        norm = getattr(attention, f"{which}_norm", None)
        return [part if norm is None else norm(part) for part in parts]

    def head_dim(self):
        return self.model.embed_dim // self.attention.num_heads

    def bias(self, head):
        """What a head of BEiT's adds for the way from one token's place to another's, (N, N): its paper's table."""
        table, index = self.attention.relative_position_bias_table, self.attention.relative_position_index
        rows = [[table[index[i, j], head].item() for j in self.place] for i in self.place]
        return torch.tensor(rows, dtype=torch.float64)

    def turned(self, rows, head):
        """Rows (N, d) of one head, each patch's turned by the angles of its place."""
        if self.table is None:
            return rows
        out, d = rows.clone(), rows.shape[1]
        first, second = torch.arange(d).view(2, -1) if self.attention.rotate_half else torch.arange(d).view(-1, 2).T
        angles = self.table[head] if self.table.ndim == 3 else self.table
        for token in range(self.prefix, len(rows)):
            sin, cos = angles[self.place[token] - self.prefix].chunk(2)
            a, b = rows[token, first], rows[token, second]
            out[token, first] = a * cos[first] - b * sin[first]
            out[token, second] = b * cos[second] + a * sin[second]
        return out

    def matrices(self, sized=True):
        normed = self.before_attention()
        queries, keys = self.heads(normed, "q"), self.heads(normed, "k")
        found = []
        for head, query in enumerate(queries):
            key = self.turned(keys[head // (len(queries) // len(keys))], head)
            logits = self.turned(query, head) @ key.T / math.sqrt(self.head_dim())
            if isinstance(self.model, Beit):
                logits = logits + self.bias(head)
            if self.weighs_size and sized:
                logits = logits + torch.tensor(self.size, dtype=torch.float64).log()
            found.append(logits.softmax(-1))
        return found

    def out(self, normed, matrices):
        attention, values = self.attention, self.heads(normed, "v")
        shared = len(matrices) // len(values)
        out = torch.cat([matrix @ values[head // shared] for head, matrix in enumerate(matrices)], dim=-1)
        return attention.proj(attention.norm(out) if hasattr(attention, "norm") else out)

    def head(self):
        model, x = self.model, self.model.norm(self.x)
        if hasattr(model, "head_dist"):
            return (model.head(x[0]) + model.head_dist(x[1])) / 2
        attention_pool = getattr(model, "attn_pool", None)
        everything = isinstance(model, Eva) or getattr(model, "pool_include_prefix", False)
        first = 0 if everything and attention_pool is not None else self.prefix
        members = [token for token in range(first, len(x)) for _ in range(round(self.size[token]))]
        size = torch.tensor(self.size if self.method != "gtp" else [1] * len(x), dtype=torch.float64)[first:]
        if any(one != round(one) for one in size.tolist()) or self.method == "gtp":  # sizes that count no patches
            if attention_pool is not None:
                pooled = attention_pool(x[None, first:], attn_mask=size.log()[None, None, None])[0]
            else:
                pooled = (size[:, None] * x[first:]).sum(0) / size.sum() if model.global_pool == "avg" else x[0]
        elif attention_pool is not None:
            pooled = attention_pool(x[members][None])[0]
        elif model.global_pool == "avg":
            pooled = x[members].mean(0)
        else:
            pooled = x[0]
        return model.head(model.fc_norm(pooled))

    # The methods. Each gives groups of tokens, the first of which is the target, and weights to merge them by.

    def importance(self, matrices):
        if has_class_token(self.model):
            return sum(matrix[0] for matrix in matrices) / len(matrices)
        return sum(matrix.mean(0) for matrix in matrices) / len(matrices)

    def patches(self):
        return range(self.prefix, len(self.x))

    def sets(self):
        return [[token for token in self.patches() if token % 2 == parity] for parity in (0, 1)]

    def pairs(self, score, r):
        """The r best proposals (source, target) from even to odd positions."""
        even, odd = self.sets()
        best = {a: max(odd, key=lambda b: score(a, b)) for a in even}
        going = sorted(even, key=lambda a: -score(a, best[a]))[:r]
        stay = [[token] for token in [*range(self.prefix), *(a for a in even if a not in going), *odd]]
        return stay, [(a, best[a]) for a in going]

    def both_ways(self, score, r):
        """Groups after r // 2 tokens went from even to odd and r − r // 2, with all that joined them, the other way."""
        even, odd = self.sets()
        best = {a: max(odd, key=lambda b: score(a, b)) for a in even}
        going = sorted(even, key=lambda a: -score(a, best[a]))[: r // 2]
        members = {token: [token] for token in range(len(self.x)) if token not in going}
        for a in going:
            members[best[a]].append(a)
        left = [a for a in even if a not in going]
        back = {b: max(left, key=lambda a: score(a, b)) for b in odd}
        ranked = sorted(odd, key=lambda b: -score(back[b], b))
        for b in ranked[: r - r // 2]:
            members[back[b]] += members[b]
        return [members[token] for token in [*range(self.prefix), *left, *ranked[r - r // 2 :]]]

    def join(self, groups, pairs):
        for source, target in pairs:
            next(group for group in groups if group[0] == target).append(source)
        return groups

    def tome(self, r, keys, importance):
        return self.join(*self.pairs(lambda a, b: cosine(keys[a], keys[b]), r)), self.size

    def tofu(self, r, keys, importance):
        groups, pairs = self.pairs(lambda a, b: cosine(keys[a], keys[b]), r)
        if self.number < self.params["prune_blocks"]:
            return groups, self.size
        self.longest = True
        return self.join(groups, pairs), self.size

    def mctf(self, r, matrices):
        received = sum(matrix.mean(0) for matrix in matrices) / len(matrices)
        g = (1 / received) / (1 / received).max()
        h = [min(self.size) / size for size in self.size]

        def attraction(a, b):
            similar = (cosine(self.x[a], self.x[b]) + 1) / 2
            return similar * (g[a] * g[b]).item() ** (1 / 20) * (h[a] * h[b]) ** (1 / 40)

        weights = [received[token].item() * size / max(self.size) for token, size in enumerate(self.size)]
        if self.params.get("bidirectional", True):
            return self.both_ways(attraction, r), weights
        return self.join(*self.pairs(attraction, r)), weights

    def mstm(self, r, keys, importance):
        ranked = sorted(self.patches(), key=lambda token: -importance[token].item())
        crucial, rest = sorted(ranked[:-r]), ranked[-r:]
        features = keys + 0.5 * (self.pooled(keys, 2) + self.pooled(keys, 4))
        nearest = [(one, max(crucial, key=lambda b, one=one: cosine(features[one], features[b]))) for one in rest]
        groups = [[token] for token in [*range(self.prefix), *crucial]]
        return self.join(groups, nearest), [a.item() * size for a, size in zip(importance, self.size, strict=True)]

    def pooled(self, keys, side):
        """What each token's cells see on average: cells hold their token's keys, windows average their cells."""
        owner = {(p // coverage.SIDE, p % coverage.SIDE): self.where[self.prefix + p] for p in range(coverage.SIDE**2)}
        windows: dict[tuple[int, int], list[int]] = {}
        for (row, column), token in owner.items():
            windows.setdefault((row // side, column // side), []).append(token)
        out = torch.zeros_like(keys)
        for token in self.patches():
            cells = [cell for cell, has in owner.items() if has == token]
            for row, column in cells:
                out[token] += keys[windows[row // side, column // side]].mean(0) / len(cells)
        return out

    def evit(self, r, keys, importance):
        ranked = sorted(self.patches(), key=lambda token: -importance[token].item())
        self.total = True
        kept = [[token] for token in [*range(self.prefix), *ranked[:-r]]]
        return [*kept, ranked[-r:]], importance.tolist()

    def pitome(self, r, keys, importance):
        margin, depth = 0.75 - 0.75 * self.number / len(self.model.blocks), len(self.model.blocks)
        unit = keys / keys.norm(dim=-1, keepdim=True)
        alike = (unit @ unit.T).tolist()
        apart = [[one - margin for one in row[self.prefix :]] for row in alike[self.prefix :]]
        energy = [sum(d if d > 0 else math.expm1(d) for d in row) / len(row) for row in apart]
        ranked = sorted(self.patches(), key=lambda token: -energy[token - self.prefix])
        early = self.number < math.ceil(depth / 2)
        matched, rest = (ranked, []) if early else (ranked[: 2 * r], ranked[2 * r :])
        a, b = matched[::2], matched[1::2]
        best = {i: max(b, key=lambda j: alike[i][j]) for i in a}
        a.sort(key=lambda i: -alike[i][best[i]])
        groups = [[token] for token in [*range(self.prefix), *a[r:], *rest, *b]]
        return self.join(groups, [(i, best[i]) for i in a[:r]]), self.size

    def random(self, r, keys, importance):
        """The draw is not for the definition to say, but records made with it are; all images have the same."""
        drawn = np.random.RandomState([self.params["seed"], self.number]).permutation(len(self.patches()))
        return [[token] for token in [*range(self.prefix), *sorted(self.prefix + drawn[r:])]], self.size

    def topk(self, r, keys, importance):
        ranked = sorted(self.patches(), key=lambda token: -importance[token].item())
        return [[token] for token in [*range(self.prefix), *ranked[:-r]]], self.size

    def diffrate(self, r, keys, importance):
        ranked = sorted(self.patches(), key=lambda token: -importance[token].item())
        stay, merged = ranked[:-r], ranked[-r : len(ranked) - int(self.params["prune"] * r)]
        alike = {i: {j: cosine(self.x[i], self.x[j]) for j in stay} for i in merged}
        best = [(i, max(stay, key=lambda j, i=i: alike[i][j])) for i in merged]
        self.mass = list(self.size)
        for i, j in best:
            self.mass[i] *= alike[i][j]
        return self.join([[token] for token in [*range(self.prefix), *stay]], best), [1.0] * len(self.x)

    def ppt(self, r, keys, importance):
        values = self.heads(self.normed, "v")
        raw = [
            importance[token].item() * sum(v[token].square().sum() for v in values).sqrt() for token in self.patches()
        ]
        score = [one / sum(raw) for one in raw]
        mean = 1 / len(score)
        if sum((one - mean) ** 2 for one in score) / (len(score) - 1) < self.params["tau"]:
            return self.tome(r, keys, importance)
        ranked = sorted(self.patches(), key=lambda token: -score[token - self.prefix])
        return [[token] for token in [*range(self.prefix), *ranked[:-r]]], self.size

    def atc(self, r, keys, importance):
        apart = [[1 - cosine(one, other) for other in keys] for one in keys]
        clusters = [[token] for token in self.patches()]
        for _ in range(r):
            pairs = [(a, b) for a in range(len(clusters)) for b in range(a + 1, len(clusters))]
            a, b = min(
                pairs,
                key=lambda pair: (
                    sum(apart[i][j] for i in clusters[pair[0]] for j in clusters[pair[1]])
                    / (len(clusters[pair[0]]) * len(clusters[pair[1]]))
                ),
            )
            clusters[a] = sorted(clusters[a] + clusters.pop(b))
        return [[token] for token in range(self.prefix)] + clusters, self.size

    def cgsm(self, r, keys, importance):
        whole = torch.cat(self.heads(self.normed, "k"), dim=-1)
        alike = {
            i: {j: cosine(whole[min(i, j)], whole[max(i, j)]) for j in self.patches() if j != i} for i in self.patches()
        }
        ranked = sorted(self.patches(), key=lambda i: -max(alike[i].values()))
        score = {i: max([alike[i][j] for j in ranked[place + 1 :]], default=-2) for place, i in enumerate(ranked)}
        order = sorted(self.patches(), key=lambda i: -score[i])
        pairs = [(i, max(order[r:], key=lambda j, i=i: alike[i][j])) for i in order[:r]]
        return self.join([[token] for token in [*range(self.prefix), *sorted(order[r:])]], pairs), self.size

    def vidtldr(self, r, keys, importance):
        mean = sum(self.before) / len(self.before)
        sharp = [sum(a * math.log(a) for a in mean[token].tolist()) for token in self.patches()]
        sharp = [(one - min(sharp)) / (max(sharp) - min(sharp)) for one in sharp]
        above = [one - sum(sharp) / len(sharp) for one in sharp]
        salient = [0.0] * self.prefix + [max(one, 0) / max(above) for one in above]
        groups, pairs = self.pairs(lambda a, b: cosine(self.x[a], self.x[b]), r)
        self.mass = list(self.size)
        for source, _ in pairs:
            self.mass[source] *= salient[source]
        return self.join(groups, [pair for pair in pairs if salient[pair[0]] > 0]), self.mass

    def largest(self, matrix):
        k = int(matrix.numel() * (1 - self.params["sparsity"]))
        return torch.where(matrix < matrix.flatten().sort().values[k - 1], 0, matrix)

    def gtp(self, r, keys, importance):
        rank = {
            j: max(m[j, j].item() for m in self.used) * max(m[:, j].sum().item() for m in self.used)
            for j in self.patches()
        }
        ranked = sorted(self.patches(), key=lambda token: -rank[token])
        graph = self.graph()
        cell = {now: number for number, now in enumerate(self.where[self.prefix :]) if now != -1}
        for i in ranked[:-r]:
            shares = [(self.params["alpha"] * graph[cell[i]][cell[j]], j) for j in ranked[-r:]]
            self.taken[i] = sum(w * self.x[j] for w, j in shares), sum(w * self.size[j] for w, j in shares)
        return [[token] for token in [*range(self.prefix), *ranked[:-r]]], self.size

    def graph(self):
        """The neighbours of each first patch, weighted by the two's numbers of neighbours."""
        patches, near, side = self.first[self.prefix :], [], coverage.SIDE
        for i, one in enumerate(patches):
            others = [j for j in range(len(patches)) if j != i]
            alike = sorted(others, key=lambda j, one=one: -cosine(one, patches[j]))[:8]
            touch = [j for j in others if max(abs(i // side - j // side), abs(i % side - j % side)) == 1]
            near.append({*alike, *touch})
        return [
            [(j in near[i]) / math.sqrt(len(near[i]) * len(near[j])) for j in range(len(patches))]
            for i in range(len(patches))
        ]

    def dpcknn(self, r):
        apart = {i: {j: (self.x[i] - self.x[j]).norm().item() for j in self.patches()} for i in self.patches()}
        apart = {i: {j: d / math.sqrt(self.x.shape[1]) for j, d in row.items()} for i, row in apart.items()}
        density = {i: math.exp(-sum(d * d for d in sorted(row.values())[:5]) / 5) for i, row in apart.items()}
        largest = max(d for row in apart.values() for d in row.values())
        peak = {
            i: min([d for j, d in apart[i].items() if (-density[j], j) < (-density[i], i)], default=largest)
            for i in apart
        }
        ranked = sorted(self.patches(), key=lambda i: -density[i] * peak[i])
        pairs = [(i, min(ranked[:-r], key=lambda j, i=i: apart[i][j])) for i in ranked[-r:]]
        return self.join([[token] for token in [*range(self.prefix), *ranked[:-r]]], pairs), [1.0] * len(self.x)

    def kmedoids(self, r, keys, importance):
        received = {j: sum(matrix[:, j].sum().item() for matrix in self.used) for j in self.patches()}
        apart = {i: {j: (self.x[i] - self.x[j]).norm().item() for j in self.patches()} for i in self.patches()}
        cost = {i: received[i] * sum(apart[i].values()) for i in self.patches()}
        centres = sorted(self.patches(), key=lambda j: -received[j])[:-r]
        for turn in range(4):
            clusters = {centre: [centre] for centre in centres}
            for i in self.patches():
                if i not in clusters:
                    clusters[min(centres, key=lambda j, i=i: apart[i][j])].append(i)
            if turn < 3:
                centres = [min(sorted(clusters[centre]), key=cost.get) for centre in centres]
        self.instead = [self.x[centre] for centre in centres]
        return [[token] for token in range(self.prefix)] + list(clusters.values()), [1.0] * len(self.x)

    def ats(self, r, keys, importance):
        values = self.heads(self.normed, "v")
        each = [values[head // (len(self.used) // len(values))] for head in range(len(self.used))]
        rows = [matrix[0] if has_class_token(self.model) else matrix.mean(0) for matrix in self.used]
        if self.params["form"] == "midpoints":
            raw = [sum(row[j] * v[j].norm() for row, v in zip(rows, each, strict=True)).item() for j in self.patches()]
            order, points = list(self.patches()), self.nominal - self.prefix - r
            points = [(2 * i + 1) / (2 * (points + 1)) for i in range(points)]
        else:
            raw = [
                (sum(row[j] for row in rows) * torch.cat([v[j] for v in values]).norm()).item() for j in self.patches()
            ]
            order, points = sorted(self.patches(), key=lambda j: raw[j - self.prefix]), []
        total = np.cumsum([raw[j - self.prefix] / sum(raw) for j in order])
        if self.params["form"] == "released":
            total = (total - total[0]) / (total[-1] - total[0])
            points = np.linspace(total[1], 1, coverage.SIDE**2)
        taken = {int(np.abs(total - point).argmin()) for point in points}
        return [[token] for token in [*range(self.prefix), *(order[place] for place in sorted(taken))]], self.size

    def dct(self, r, keys, importance):
        before = len(self.patches())
        after = before - r

        def wave(length, k, i):
            return math.sqrt((1 + (k > 0)) / length) * math.cos(math.pi * (2 * i + 1) * k / (2 * length))

        patches = self.x[self.prefix :]
        found = [sum(wave(before, k, i) * patches[i] for i in range(before)) for k in range(after)]
        self.instead = [sum(wave(after, k, i) * found[k] for k in range(after)) for i in range(after)]
        groups = [[self.prefix + (2 * k + 1) * before // (2 * after)] for k in range(after)]
        for i in range(before):
            if [self.prefix + i] not in (group[:1] for group in groups):
                groups[(2 * i + 1) * after // (2 * before)].append(self.prefix + i)
        return [[token] for token in range(self.prefix)] + groups, [1.0] * len(self.x)

    def reduced(self, matrix, groups, weights):
        out = torch.zeros(len(groups), len(groups), dtype=torch.float64)
        for m, rows in enumerate(groups):
            for n, columns in enumerate(groups):
                for row in rows:
                    share = weights[row] / sum(weights[one] for one in rows)
                    out[m, n] += share * matrix[row, columns].sum()
        return out

    def regroup(self, groups, weights):
        rows = []
        for group in groups:
            joined = sum(weights[token] * self.x[token] for token in group)
            if getattr(self, "total", False) and group is groups[-1]:
                rows.append(joined)
            elif len(group) == 1:
                rows.append(self.x[group[0]])
            elif getattr(self, "longest", False):
                rows.append(joined / joined.norm() * max(self.x[token].norm() for token in group))
            else:
                rows.append(joined / sum(weights[token] for token in group))
        if self.instead is not None:
            rows = [*rows[: self.prefix], *self.instead]
        slot = {token: number for number, group in enumerate(groups) for token in group}
        self.where = [-1 if now == -1 else slot.get(now, -1) for now in self.where]
        if self.tracks_size:
            mass = self.size if self.mass is None else self.mass
            self.size = [max(1e-6, sum(mass[token] for token in group)) for group in groups]
        else:
            self.size = [self.size[group[0]] for group in groups]
        self.place = [self.place[group[0]] for group in groups]
        self.x = torch.stack(rows)
        for target, (row, size) in self.taken.items():
            self.x[slot[target]] += row
            self.size[slot[target]] += size
        self.instead, self.mass, self.taken = None, None, {}


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()

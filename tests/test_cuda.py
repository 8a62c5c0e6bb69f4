"""Whole models on a card: against the CPU's engine, alone and in batches, and what doesn't fit. Needs a card."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import write_checkpoint, write_overflowing
from halfturn import _C
from halfturn.error import Error
from halfturn.generator import Generator
from halfturn.model import Model
from halfturn.sampling import SamplingParams

PROBLEM = _C.cuda_problem()
pytestmark = pytest.mark.skipif(bool(PROBLEM), reason=f"no CUDA: {PROBLEM}")

SHAPE: dict[str, Any] = dict(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=300)
SHAPES: dict[str, dict[str, Any]] = {
    "plain": SHAPE,
    "rotated": {**SHAPE, "rotation": "hadamard", "r4_block": 32, "means": True},
    "odd, biases": dict(
        hidden=72, intermediate=172, layers=2, heads=6, kv_heads=3, head_dim=10, vocab=261, biases=True, r4_block=4
    ),
    "groups": {**SHAPE, "groups": 2, "intermediate": 192},
    "head 64, 9 to 3": dict(
        hidden=576, intermediate=1536, layers=2, heads=9, kv_heads=3, head_dim=64, vocab=700, r4_block=256,
        rotation="hadamard",
    ),
    "head 80, MHA": dict(
        hidden=320, intermediate=400, layers=1, heads=4, kv_heads=4, head_dim=80, vocab=500, random_norms=True
    ),
    "head 96, MQA": dict(
        hidden=384, intermediate=1024, layers=1, heads=8, kv_heads=1, head_dim=96, vocab=500, r4_block=1024,
        rotation="hadamard",
    ),
    "head 128, 8 to 2": dict(
        hidden=1024, intermediate=2048, layers=1, heads=8, kv_heads=2, head_dim=128, vocab=500, r4_block=1024,
        rotation="hadamard",
    ),
    "llama3 rope": {
        **SHAPE,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}  # fmt: skip


def widths(name: str) -> int:
    """Any width for each matrix."""
    return 2 + sum(map(ord, name)) % 7


def tokens_of(vocab: int, count: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, vocab, count)]


def logits(model: Any, tokens: list[int]) -> np.ndarray:
    return np.asarray(model.logits([_C.Item(tokens, 0, list(range(-(-len(tokens) // 32))))]))


def divergence(a: np.ndarray, b: np.ndarray) -> float:
    """Mean KL(a || b) of rows of logits, in nats."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(a), log_softmax(b)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kv", [(16, 16), (8, 8), (4, 4)])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_half_precision_matches_the_cpu(tmp_path: Path, shape: str, kv: tuple[int, int]) -> None:
    settings = SHAPES[shape]
    write_checkpoint(tmp_path / "m", **settings, bits=widths)
    tokens = tokens_of(settings["vocab"], 130)
    options: dict[str, Any] = {"mode": "f16", "k_bits": kv[0], "v_bits": kv[1], "context": 160}
    cpu = logits(_C.Model(str(tmp_path / "m"), **options), tokens)
    card = _C.Model(str(tmp_path / "m"), device="cuda", **options)
    assert divergence(cpu, logits(card, tokens)) < (1e-4 if kv == (16, 16) else 2e-3)
    # One token at a time: the kernels of decoding.
    single = [np.asarray(card.logits([_C.Item([t], i, [3, 4, 1, 0, 2])]))[0] for i, t in enumerate(tokens)]
    assert divergence(cpu, np.stack(single)) < (1e-4 if kv == (16, 16) else 2e-3)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("mode", ["a8", "f16"])
def test_every_width(tmp_path: Path, bits: int, mode: str) -> None:
    write_checkpoint(tmp_path / "m", **SHAPES["rotated"], bits=bits)
    tokens = tokens_of(300, 70)
    options: dict[str, Any] = {"mode": mode, "k_bits": 16, "v_bits": 16, "context": 96}
    cpu = logits(_C.Model(str(tmp_path / "m"), **options), tokens)
    card = _C.Model(str(tmp_path / "m"), device="cuda", **options)
    limit = 1e-4 if mode == "f16" else 2e-3  # an activation that rounds the other way moves a code by one
    assert divergence(cpu, logits(card, tokens)) < limit
    single = [np.asarray(card.logits([_C.Item([t], i, [0, 1, 2])]))[0] for i, t in enumerate(tokens)]
    assert divergence(cpu, np.stack(single)) < limit


def check_rows_alone_and_together(folder: Path, counts: Sequence[int]) -> None:
    """A row's logits are the CPU's, and the same bits alone and with others."""
    options: dict[str, Any] = {"mode": "a8", "k_bits": 16, "v_bits": 16, "context": 96}
    card = _C.Model(str(folder), device="cuda", kv_tokens=40 * 96, **options)
    tokens = tokens_of(64, 40)
    assert divergence(logits(_C.Model(str(folder), **options), tokens), logits(card, tokens)) < 2e-3
    items = [_C.Item([t], 0, [i]) for i, t in enumerate(tokens)]
    single = np.concatenate([card.logits([item]) for item in items])
    for count in counts:
        assert np.array_equal(np.asarray(card.logits(items[:count])), single[:count]), count


@pytest.mark.parametrize("hidden", [80, 4112, 5120, 9232])
def test_norms_less_their_means(tmp_path: Path, hidden: int) -> None:
    """Rows that blocks norm themselves (one or two, of up to 8192 inputs), or a kernel of its own: the same bits."""
    shape = {**SHAPE, "hidden": hidden, "layers": 1, "vocab": 64}
    write_checkpoint(tmp_path / "m", **shape, bits=5, means=True, random_norms=True, biases=hidden == 80)
    check_rows_alone_and_together(tmp_path / "m", (2, 3, 20))


@pytest.mark.parametrize("intermediate", [6208, 14400, 16416])
@pytest.mark.parametrize("bits", [2, 4, "any"])
def test_wide_rows(tmp_path: Path, bits: int | str, intermediate: int) -> None:
    """Rows of which blocks make an operand, with one team or two or one of all warps, or a kernel of its own does: the
    same bits."""
    shape = {**SHAPE, "intermediate": intermediate, "layers": 1, "vocab": 64, "r4_block": 32}
    write_checkpoint(tmp_path / "m", **shape, bits=widths if bits == "any" else bits)
    check_rows_alone_and_together(tmp_path / "m", (2, 3, 12, 20, 40))


def greedy(model: Any, prompts: list[list[int]], count: int, together: bool) -> list[list[int]]:
    """`count` greedy tokens of each prompt, by decoding steps alone or of all prompts together."""
    tables = [list(range(8 * i, 8 * i + 8)) for i in range(len(prompts))]
    out: list[list[int]] = []
    for prompt, table in zip(prompts, tables):
        (sample,) = model.step([_C.Item(prompt, 0, table, _C.Sampler(temperature=0.0))])
        out.append([sample.token])
    for turn in range(count - 1):
        items = [
            _C.Item([o[-1]], len(p) + turn, t, _C.Sampler(temperature=0.0)) for o, p, t in zip(out, prompts, tables)
        ]
        samples = model.step(items) if together else [model.step([item])[0] for item in items]
        for o, sample in zip(out, samples):
            o.append(sample.token)
    return out


def test_steps_in_halves_draw_the_same_tokens(tmp_path: Path) -> None:
    """Two steps under way, with samplers of all kinds, and other calls in between."""
    write_checkpoint(tmp_path / "m", **SHAPES["rotated"], bits=widths)
    model = _C.Model(str(tmp_path / "m"), device="cuda", context=128, kv_tokens=40 * 128)
    tables = [list(range(4 * i, 4 * i + 4)) for i in range(37)]

    def samplers() -> list[Any]:
        return [
            _C.Sampler(temperature=0.0 if i % 3 == 0 else 1.0, seed=i, top_k=i, banned=[i], logprobs=i % 4 - 1)
            for i in range(37)
        ]

    def run(halves: bool, disturbed: bool = False) -> list[list[tuple[int, Any]]]:
        drawing, tokens = samplers(), [[i] for i in range(37)]
        out: list[list[tuple[int, Any]]] = []
        for step in range(20):
            given = tokens if step == 0 or not halves else [[]] * 37
            items = [_C.Item(t, step, p, s) for t, p, s in zip(given, tables, drawing)]
            if not halves:
                out.append([(s.token, s.top) for s in model.step(items)])
                tokens = [[token] for token, _ in out[-1]]
                continue
            model.start(items)
            if step:
                out.append([(s.token, s.top) for s in model.finish()])
            if disturbed and step % 3 == 1:
                model.step([_C.Item([5, 6, 7], 0, [159], _C.Sampler())])
        if halves:
            out.append([(s.token, s.top) for s in model.finish()])
        return out

    whole = run(False)
    assert run(True) == whole
    assert run(True, disturbed=True) == whole
    assert len({token for step in whole for token, _ in step}) > 20


def test_misuse_of_halves_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", **SHAPE, bits=4)
    model = _C.Model(str(tmp_path / "m"), device="cuda", context=64, kv_tokens=256)
    plain, penalized = _C.Sampler(temperature=0.0), _C.Sampler(temperature=0.0, presence_penalty=1.0)
    with pytest.raises(Error, match="no step was started"):
        model.finish()
    with pytest.raises(Error, match="item 0 has no token, and no step is under way that draws it"):
        model.start([_C.Item([], 0, [0], plain)])
    with pytest.raises(Error, match="is one token of a sequence that decodes"):
        model.start([_C.Item([1, 2], 0, [0], plain)])
    model.start([_C.Item([1], 0, [0], plain), _C.Item([1], 0, [1], penalized)])
    with pytest.raises(Error, match="has to know the 1 tokens before"):
        model.start([_C.Item([], 1, [0], plain), _C.Item([], 1, [1], penalized)])
    with pytest.raises(Error, match="the step under way draws none for it"):
        model.start([_C.Item([], 1, [0], _C.Sampler())])
    model.start([_C.Item([], 1, [0], plain)])
    with pytest.raises(Error, match="two steps are under way"):
        model.start([_C.Item([], 2, [0], plain)])
    assert [len(model.finish()), len(model.finish())] == [2, 1]


@pytest.mark.parametrize("kv", [8, 4])
def test_tokens_are_the_same_alone_and_in_a_batch(tmp_path: Path, kv: int) -> None:
    settings = SHAPES["head 64, 9 to 3"]
    write_checkpoint(tmp_path / "m", **settings, bits=widths)
    model = _C.Model(str(tmp_path / "m"), device="cuda", k_bits=kv, v_bits=kv, context=256, kv_tokens=40 * 256)
    prompts = [tokens_of(700, 5 + 6 * i, i) for i in range(37)]
    alone = greedy(model, prompts, 12, False)
    assert greedy(model, prompts, 12, True) == alone
    assert greedy(model, prompts, 12, True) == alone  # and from run to run
    assert greedy(model, prompts[:3], 12, True) == alone[:3]


@pytest.mark.parametrize(("shape", "bits"), [*(("rotated", b) for b in range(2, 9)), *((s, 4) for s in SHAPES)])
@pytest.mark.parametrize("mode", ["a8", "f16"])
def test_one_row_goes_other_ways_to_the_same_bits(tmp_path: Path, shape: str, bits: int, mode: str) -> None:
    """One and two rows leave norms and the activation to the products; three and more have launches for them."""
    settings = SHAPES[shape]
    write_checkpoint(tmp_path / "m", **settings, bits=bits)
    model = _C.Model(str(tmp_path / "m"), device="cuda", mode=mode, context=64, kv_tokens=5 * 64)
    tokens = tokens_of(settings["vocab"], 40)
    items = [[_C.Item([tokens[5 * n + i]], i, [2 * n, 2 * n + 1]) for n in range(5)] for i in range(6)]
    together = [np.asarray(model.logits(five)) for five in items]
    for count in (1, 2):
        for five, rows in zip(items, together):
            assert np.array_equal(np.asarray(model.logits(five[:count])), rows[:count]), (count, shape)


def test_rows_do_not_depend_on_their_neighbours(tmp_path: Path) -> None:
    """Bit for bit in a8, in passes of 1 to 300 rows: through the GEMV and the GEMM."""
    write_checkpoint(tmp_path / "m", **SHAPES["rotated"], bits=widths)
    model = _C.Model(str(tmp_path / "m"), device="cuda", context=512, kv_tokens=512 * 40)
    tokens = tokens_of(300, 200)
    whole = logits(model, tokens)
    for cut in (5, 31, 33, 64, 150, 199):  # the last one leaves one token of the prompt
        table = list(range(16, 32))
        parts = [model.logits([_C.Item(tokens[a:b], a, table, prompt=True)]) for a, b in ((0, cut), (cut, 200))]
        assert np.array_equal(np.concatenate([np.asarray(p) for p in parts]), whole), cut
    together = model.logits(
        [_C.Item(tokens[:n], 0, list(range(16 * i, 16 * i + 16))) for i, n in enumerate((7, 200, 41))]
    )
    assert np.array_equal(np.asarray(together)[7:207], whole)


@pytest.mark.parametrize("kv", [16, 8, 4])
def test_drawn_tokens_read_again_give_the_same_bits(tmp_path: Path, kv: int) -> None:
    """Several at once as one by one, beside others of their kind and a prompt. Those of a prompt give other bits."""
    settings = SHAPES["head 128, 8 to 2"]
    write_checkpoint(tmp_path / "m", **settings, bits=4)
    model = _C.Model(str(tmp_path / "m"), device="cuda", k_bits=kv, v_bits=kv, context=512, kv_tokens=5 * 512)
    prompt, drawn = tokens_of(500, 70), tokens_of(500, 200, 1)
    tables = [list(range(16 * i, 16 * i + 16)) for i in range(5)]
    for table in tables[:4]:
        model.logits([_C.Item(prompt, 0, table)])
    single = np.stack([np.asarray(model.logits([_C.Item([t], 70 + i, tables[0])]))[0] for i, t in enumerate(drawn)])
    parts = [(0, 1), (1, 120), (120, 200)]
    again = [model.logits([_C.Item(drawn[a:b], 70 + a, tables[1], prompt=False)]) for a, b in parts]
    assert np.array_equal(np.concatenate([np.asarray(part) for part in again]), single)
    mixed = [
        _C.Item(drawn, 70, tables[2], prompt=False),
        _C.Item(drawn[:1], 70, tables[3]),
        _C.Item(prompt, 0, tables[4]),
    ]
    rows = np.asarray(model.logits(mixed))
    assert np.array_equal(rows[:200], single) and np.array_equal(rows[200], single[0])
    assert model.decodes_apart and not np.array_equal(model.logits([_C.Item(drawn, 70, tables[2])]), single)


@pytest.mark.parametrize("kv", [8, 4])
def test_preempted_requests_draw_the_same(tmp_path: Path, kv: int) -> None:
    write_checkpoint(tmp_path / "m", **SHAPES["rotated"], bits=4, tokenizer=True)
    params = SamplingParams(max_tokens=150, temperature=1.0, seed=3, ignore_eos=True, logprobs=1)
    prompts = ["one", "and another one", "a third", "the last of these"]

    def run(tokens: int, together: bool) -> tuple[list[Any], int]:
        model = Model.load(tmp_path / "m", device="cuda", context=256, kv_tokens=tokens, kv_bits=(kv, kv))
        with Generator(model) as generator:
            batches = [prompts] if together else [[prompt] for prompt in prompts]
            outputs = [output for batch in batches for output in generator.generate(batch, params)]
            return [(o.token_ids, o.logprobs) for o in outputs], generator.stats()["preemptions"]

    alone, _ = run(2048, False)
    assert run(2048, True) == (alone, 0)
    crowded, preemptions = run(320, True)
    assert preemptions > 0 and crowded == alone


def test_prompts_longer_than_one_pass(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", **{**SHAPE, "layers": 1}, bits=3, max_position_embeddings=4096)
    model = _C.Model(str(tmp_path / "m"), device="cuda", context=4096)
    cpu = _C.Model(str(tmp_path / "m"), context=4096)
    tokens = tokens_of(300, 2500)
    assert divergence(logits(cpu, tokens), logits(model, tokens)) < 2e-3
    items = [_C.Item(tokens, 0, list(range(128)))]
    np.testing.assert_allclose(model.nll(items), cpu.nll(items), atol=0.3)
    assert abs(np.mean(model.nll(items)) - np.mean(cpu.nll(items))) < 2e-3


def test_generator_gives_the_same_text_as_on_the_cpu(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", **SHAPES["rotated"], bits=8, tokenizer=True)
    params = SamplingParams(max_tokens=20, temperature=0.0)
    texts = []
    for device in ("cpu", "cuda"):
        with Generator(Model.load(tmp_path / "m", device=device, context=128, kv_bits=(16, 16))) as generator:
            outputs = generator.generate(["one", "and another one"], params)
            texts.append([o.token_ids[:4] for o in outputs])
    assert texts[0] == texts[1]


def test_one_item_of_a_step_fails_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", **SHAPE, bits=4)
    model = _C.Model(str(tmp_path / "m"), device="cuda", context=64, kv_tokens=256)
    tokens = tokens_of(300, 30)
    best = int(logits(model, tokens)[-1].argmax())
    banned, good = _C.Sampler(temperature=0.0, banned=list(range(300))), _C.Sampler(temperature=0.0)
    reason, sample = model.step([_C.Item(tokens, 0, [2, 3], banned), _C.Item(tokens, 0, [4, 5], good)])
    assert isinstance(reason, str) and "banned" in reason and sample.token == best
    with pytest.raises(Error, match="token 300 is outside the vocabulary of 300"):
        model.step([_C.Item([300], 0, [0])])


@contextmanager
def no_memory_left() -> Iterator[None]:
    """All that is free on the first card is taken, to the last 4 KiB."""
    cuda = ctypes.CDLL("libcuda.so.1")
    context = ctypes.c_void_p()
    assert cuda.cuInit(0) == 0
    assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    assert cuda.cuCtxSetCurrent(context) == 0
    taken, size = [], 1 << 30
    while size >= 4096:
        at = ctypes.c_uint64()
        if cuda.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(size)) == 0:
            taken.append(at)
        else:
            size //= 2
    try:
        yield
    finally:
        for at in taken:
            assert cuda.cuMemFree_v2(at) == 0
        assert cuda.cuDevicePrimaryCtxRelease_v2(0) == 0


def test_steps_go_on_where_no_graph_can_be_captured(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", **{**SHAPE, "layers": 30}, bits=4)
    prompts = [tokens_of(300, 10 + i, seed=i) for i in range(40)]

    def run(model: Any) -> list[list[list[int]]]:
        return [greedy(model, prompts[:count], 6, together=True) for count in (1, 2, 4, 8, 16, 24, 32, 40)]

    options: dict[str, Any] = {"device": "cuda", "context": 256, "kv_tokens": 40 * 256}
    expected = run(_C.Model(str(tmp_path / "m"), **options))
    model = _C.Model(str(tmp_path / "m"), **options)
    with no_memory_left():
        assert run(model) == expected
    assert run(model) == expected


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("mode", ["a8", "f16"])
def test_states_that_overflow_have_a_sentence(tmp_path: Path, mode: str, means: bool) -> None:
    model = _C.Model(str(write_overflowing(tmp_path / "m", means=means)), device="cuda", mode=mode, context=512)
    for count in (1, 3, 12, 300):
        (error,) = model.step([_C.Item([5] * count, 0, list(range(10)), _C.Sampler(temperature=0.0))])
        assert error == "the model returned logits that are not numbers: its weights or scales are broken", count


def test_what_does_not_fit_is_refused_with_its_bytes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", **SHAPE, bits=4, max_position_embeddings=1 << 20)
    with pytest.raises(Error, match=r"doesn't fit the card .*: weights \d+ bytes, KV cache of 2147483648 tokens \d+"):
        _C.Model(str(tmp_path / "m"), device="cuda", context=1024, kv_tokens=1 << 31)

"""The loader: what it accepts, and that all else is refused with a sentence that names the file and the numbers."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import (
    Tensors,
    dense_weights,
    linear_shapes,
    make_levels,
    pack_codes,
    read_tensors,
    unpack_codes,
    write_checkpoint,
    write_safetensors,
)
from halfturn import _C
from halfturn.error import Error
from malformed import broken_copies, edit_config, edit_header, edit_json, split_header, weight_file, write_header

SMALL: dict[str, Any] = dict(
    hidden=20, intermediate=40, layers=2, heads=2, kv_heads=1, head_dim=8, vocab=37, bits=3, biases=True
)
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One checkpoint in a single file, one in three shards."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return (
        write_checkpoint(folder / "single", **SMALL),
        write_checkpoint(folder / "shards", **SMALL, shards=3, seed=1),
    )


@pytest.fixture
def single(templates: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(templates[0], tmp_path / "model"))


@pytest.fixture
def sharded(templates: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(templates[1], tmp_path / "model"))


def refused(folder: Path, *parts: str) -> None:
    """The loader's one sentence has all of `parts` in it."""
    with pytest.raises(Error) as caught:
        _C.inspect(str(folder))
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message and len(message) < 700


# --- what loads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_loads_and_decodes(bits: int, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", hidden=48, intermediate=80, vocab=50, bits=bits, groups=2, seed=bits)
    tensors, dense = read_tensors(folder), dense_weights(folder)
    table = _C.inspect(str(folder))
    for entry in table["linears"]:
        name = entry["name"]
        weights = _C.dequantize(*(tensors[f"{name}.{part}"] for part in ("codes", "scales", "levels")), bits)
        assert weights.dtype == np.float32 and weights.shape == (entry["out_padded"], entry["in_padded"])
        np.testing.assert_array_equal(weights[: entry["out"], : entry["in"]], dense[name])
        assert not weights[entry["out"] :].any()


def test_inspect_reports_shapes_and_bits(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "m", **SMALL | {"bits": lambda name: 6 if name == "lm_head" else 4}, r4_block=8, shards=2
    )
    table = _C.inspect(str(folder))
    config = json.loads((folder / "config.json").read_text())
    assert table["config"] == config
    linears = {entry["name"]: entry for entry in table["linears"]}
    assert [(e["name"], e["in"], e["out"]) for e in table["linears"]] == [s[:3] for s in linear_shapes(config)]
    down = linears["model.layers.1.mlp.down_proj"]
    assert (down["bits"], down["r4_block"], down["groups"], down["group_size"], down["in_padded"]) == (4, 8, 1, 48, 48)
    # 3 x 2 tiles of 32 words, 32 half-precision scales, 16 levels
    assert down["bytes"] == 3 * 2 * 32 * 4 + 32 * 2 + 16 and down["weights"] == 40 * 20
    assert down["bias_bytes"] == 20 * 4
    decoder = [e for e in table["linears"] if e["name"].startswith("model.layers")]
    assert table["decoder"]["bytes"] == sum(e["bytes"] for e in decoder)
    assert table["decoder"]["bpw"] == pytest.approx(
        8 * sum(e["bytes"] for e in decoder) / sum(e["weights"] for e in decoder), rel=1e-5
    )
    assert linears["lm_head"]["bits"] == 6 and table["norm_bytes"] == 5 * 20 * 2
    assert table["total"]["bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 4},
        {"type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
)
def test_rope_scalings_load(scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    _C.inspect(str(write_checkpoint(tmp_path / "m", **SMALL, rope_scaling=scaling)))


def test_a_link_to_a_shard_is_fine(sharded: Path, tmp_path: Path) -> None:
    """The hub's cache keeps files elsewhere and links them into the folder."""
    first = weight_file(sharded)
    first.rename(tmp_path / "blob")
    first.symlink_to(tmp_path / "blob")
    _C.inspect(str(sharded))


# --- the codec --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_tiles_hold_each_bit_where_the_format_says(bits: int) -> None:
    """One code set at a time: element 8l+j is output l//4 + 8h and input 2(l%4) + b + 8kh, planes widest first."""
    planes = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[bits]
    for t in range(256):
        lane, j = divmod(t, 8)
        output, column = lane // 4 + 8 * (j >> 2), 2 * (lane % 4) + (j & 1) + 8 * ((j >> 1) & 1)
        codes = np.zeros((16, 16), np.uint8)
        codes[output, column] = (1 << bits) - 1
        expected, start = 0, 0
        for plane in planes:
            expected |= ((1 << plane) - 1) << (start + t * plane)
            start += 256 * plane
        words = np.frombuffer(expected.to_bytes(32 * bits, "little"), "<u4")
        np.testing.assert_array_equal(_C.pack(codes, bits).ravel(), words)
        np.testing.assert_array_equal(_C.unpack(words.reshape(1, 1, -1), bits), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_pack_and_unpack_agree_with_numpy(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (48, 80), dtype=np.uint8)
    tiles = _C.pack(codes, bits)
    assert tiles.shape == (5, 3, 8 * bits) and tiles.dtype == np.uint32
    np.testing.assert_array_equal(tiles, pack_codes(codes, bits))
    np.testing.assert_array_equal(_C.unpack(tiles, bits), codes)
    np.testing.assert_array_equal(unpack_codes(tiles, bits), codes)


def test_the_codec_refuses_wrong_arrays() -> None:
    tiles = np.zeros((1, 1, 32), np.uint32)
    levels = make_levels(4, np.random.default_rng(0))
    with pytest.raises(Error, match="bits is 9, expected 2 to 8"):
        _C.unpack(tiles, 9)
    with pytest.raises(Error, match=r"tiles of 3 bits are .*24.*32"):
        _C.unpack(tiles, 3)
    with pytest.raises(Error, match="code of output 2, input 5 is 8, 3 bits hold at most 7"):
        codes = np.zeros((16, 16), np.uint8)
        codes[2, 5] = 8
        _C.pack(codes, 3)
    with pytest.raises(Error, match="multiple of 16"):
        _C.pack(np.zeros((16, 8), np.uint8), 3)
    with pytest.raises(Error, match="scales are float16"):
        _C.dequantize(tiles, np.zeros((1, 16), np.float32), levels, 4)
    with pytest.raises(Error, match="levels has 16 values, 3 bits have 8"):
        _C.dequantize(np.zeros((1, 1, 24), np.uint32), np.zeros((1, 16), np.float16), levels, 3)


# --- config.json ------------------------------------------------------------------------------------------------------


def setting(value: Any, *path: str | int) -> Callable[[Any], None]:
    """An edit that sets what stands at `path`."""

    def edit(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return edit


def without(*path: str) -> Callable[[Any], None]:
    def edit(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        del document[path[-1]]

    return edit


Q = "quantization_config"
LINEARS = (Q, "linears")
Q_PROJ = (*LINEARS, "model.layers.1.self_attn.q_proj")
DOWN = (*LINEARS, "model.layers.1.mlp.down_proj")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}

CONFIGS: list[tuple[Callable[[Any], None], list[str]]] = [
    (without(Q), ["has no quantization_config", "halfturn convert"]),
    (setting("gptq", Q, "quant_method"), ["quant_method", '"gptq"', "halfturn convert"]),
    (setting(2, Q, "format"), ["format 2", "format 1", "newer version", "upgrade"]),
    (setting(0, Q, "format"), ["format is 0"]),
    (setting("1", Q, "format"), ["format", '"1"']),
    (setting("learned", Q, "rotation"), ["rotation", '"learned"', "hadamard and none"]),
    (without(Q, "rotation"), ["lacks quantization_config.rotation"]),
    (setting([], *LINEARS), ["linears", "expected an object"]),
    (setting("mistral", "model_type"), ["model_type", '"mistral"', "llama"]),
    (setting("gelu", "hidden_act"), ["hidden_act", '"gelu"', "silu"]),
    (setting(True, "tie_word_embeddings"), ["tie_word_embeddings"]),
    (setting(1, "attention_bias"), ["attention_bias is 1", "true or false"]),
    (without("hidden_size"), ["lacks hidden_size"]),
    (setting(None, "hidden_size"), ["lacks hidden_size"]),
    (setting(0, "hidden_size"), ["hidden_size is 0", "from 1 to 131072"]),
    (setting(-16, "hidden_size"), ["hidden_size is -16"]),
    (setting("64", "hidden_size"), ["hidden_size", '"64"', "whole number"]),
    (setting(20.0, "hidden_size"), ["hidden_size is 20", "whole number"]),
    (setting(2**17 + 1, "intermediate_size"), ["intermediate_size is 131073"]),
    (setting(2**80, "vocab_size"), ["vocab_size", "from 1 to 16777216"]),
    (setting(1025, "num_hidden_layers"), ["num_hidden_layers is 1025", "1024"]),
    (setting(2**32, "num_attention_heads"), ["num_attention_heads is 4294967296"]),
    (setting(3, "num_key_value_heads"), ["num_attention_heads is 2", "num_key_value_heads 3"]),
    (setting(7, "head_dim"), ["head_dim is 7", "even"]),
    (lambda c: c.update(num_attention_heads=1024, head_dim=1024), ["1048576", "131072"]),
    (setting(0, "rms_norm_eps"), ["rms_norm_eps is 0"]),
    (setting(0, "rope_theta"), ["rope_theta is 0"]),
    (setting(0, "max_position_embeddings"), ["max_position_embeddings is 0"]),
    (setting({"rope_type": "yarn", "factor": 2.0}, "rope_scaling"), ['"yarn"', "linear, dynamic and llama3"]),
    (setting({"rope_type": "linear"}, "rope_scaling"), ["lacks rope_scaling.factor"]),
    (setting({"rope_type": "linear", "factor": 0.5}, "rope_scaling"), ["factor is 0.5"]),
    (setting("linear", "rope_scaling"), ["rope_scaling", "expected an object"]),
    (setting(LLAMA3, "rope_scaling"), ["lacks rope_scaling.low_freq_factor"]),
    (setting(LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 4.0}, "rope_scaling"), ["high_freq_factor is 4"]),
    (without(*Q_PROJ), ["lists no linear model.layers.1.self_attn.q_proj"]),
    (setting({"segments": []}, *LINEARS, "model.extra"), ["model.extra", "exactly 1"]),
    (
        setting({"segments": [{"codec": "grid", "bits": 4, "rows": 16}]}, *LINEARS, "model.extra"),
        ['lists the linear "model.extra"', "has none of that name"],
    ),
    (lambda c: c[Q]["linears"]["lm_head"]["segments"].append({}), ["an array of 2", "exactly 1"]),
    (setting("trellis", *Q_PROJ, "segments", 0, "codec"), ['"trellis"', "grid", "upgrade"]),
    (setting(1, *Q_PROJ, "segments", 0, "bits"), ["bits is 1", "from 2 to 8"]),
    (setting(9, *Q_PROJ, "segments", 0, "bits"), ["bits is 9", "from 2 to 8"]),
    (setting(4, *Q_PROJ, "segments", 0, "bits"), ["q_proj.codes is U32 [2, 1, 24]", "says U32 [2, 1, 32]"]),
    (setting(48, *Q_PROJ, "segments", 0, "rows"), ["q_proj has 48 rows", "20", "32"]),
    (setting(True, *Q_PROJ, "segments", 0, "zeros"), ['"zeros"', "upgrade"]),
    (setting([1], *Q_PROJ, "permutation"), ['"permutation"', "upgrade"]),
    (setting(3, *DOWN, "r4_block"), ["r4_block is 3", "power of two"]),
    (setting(16, *DOWN, "r4_block"), ["r4_block 16", "does not divide its 40 inputs"]),
    (setting(4, *Q_PROJ, "r4_block"), ["r4_block 4", "only down_proj"]),
]


@pytest.mark.parametrize(("edit", "parts"), CONFIGS)
def test_config_is_refused(edit: Callable[[Any], None], parts: list[str], single: Path) -> None:
    edit_config(single, edit)
    refused(single, *parts)


TEXTS: list[tuple[str, list[str]]] = [
    ("", ["config.json is empty"]),
    ("{", ["config.json", "byte 1 of 1"]),
    ("[1, 2]", ["an array of 2", "expected an object"]),
    ('{"a": 1} x', ["behind its end"]),
    ('{"a": 1, "a": 2}', ['the key "a" twice']),
    ('{"a": NaN}', ["not a JSON value"]),
    ('{"a": nul}', ["not JSON"]),
    ('{"a": 01}', ["begins with 0"]),
    ('{"a": 1.}', ["not a JSON value"]),
    ('{"a": 1e999}', ["1e999", "double"]),
    ('{"a": "\\x"}', ["unknown escape"]),
    ('{"a": "\\ud800"}', ["surrogate"]),
    ('{"a": "\\u12"}', ["hex digits"]),
    ('{"a": "tab\t"}', ["control character"]),
    ('{"a": "', ["does not end"]),
    ('{"a" 1}', ["':'"]),
    ("{1: 2}", ["key in quotes"]),
    ('{"a": [1, 2}', ["array that does not end"]),
    ('{"a": ' + "[" * 100_000, ["nests deeper than 32 levels"]),
    ('{"a": [' + "0," * 600_000 + "0]}", ["more than 500000 values"]),
    ('{"a": "' + "x" * (17 << 20) + '"}', ["at most 16777216"]),
]


@pytest.mark.parametrize(("text", "parts"), TEXTS, ids=lambda value: str(value)[:24])
def test_config_text_is_refused(text: str, parts: list[str], single: Path) -> None:
    (single / "config.json").write_text(text)
    refused(single, *parts)


@pytest.mark.parametrize("text", [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\x80"])
def test_config_that_is_not_utf8_is_refused(text: bytes, single: Path) -> None:
    (single / "config.json").write_bytes(b'{"a": "' + text + b'"}')
    refused(single, "not UTF-8")


def test_text_comes_through_unchanged(single: Path) -> None:
    name = 'Ünï "quoted" \\ 日本語 😀 \n\u2028'
    edit_config(single, setting(name, "_name"))
    assert _C.inspect(str(single))["config"]["_name"] == name
    raw = (single / "config.json").read_text()
    (single / "config.json").write_text(raw.replace(json.dumps(name), json.dumps(name, ensure_ascii=False)))
    assert _C.inspect(str(single))["config"]["_name"] == name


# --- safetensors ------------------------------------------------------------------------------------------------------

NORM = "model.norm.weight"
CODES = "model.layers.1.mlp.down_proj.codes"


def shift(name: str, begin: int, end: int) -> Callable[[Any], None]:
    def edit(header: Any) -> None:
        offsets = header[name]["data_offsets"]
        header[name]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return edit


def overlap(header: Any) -> None:
    header["lm_head.levels"]["data_offsets"] = header["model.embed_tokens.levels"]["data_offsets"]


HEADERS: list[tuple[Callable[[Any], None], list[str]]] = [
    (without(NORM), ["hole"]),
    (overlap, ["overlap"]),
    (shift(NORM, 2, 2), ["hole"]),
    (shift(NORM, 0, 4), [NORM, "F16 [20] = 40 bytes", "span 44"]),
    (setting("BF16", NORM, "dtype"), [NORM, '"BF16"', "halfturn convert"]),
    (setting(7, NORM, "dtype"), [NORM, "dtype, shape and two data_offsets"]),
    (setting([], NORM, "shape"), [NORM, "has 0 dimensions"]),
    (setting([1] * 9, NORM, "shape"), [NORM, "has 9 dimensions"]),
    (setting([0], NORM, "shape"), [NORM, "dimension 0"]),
    (setting([-20], NORM, "shape"), [NORM, "dimension -20"]),
    (setting([20.0], NORM, "shape"), [NORM, "dimension 20"]),
    (setting([2**62, 2**62], NORM, "shape"), [NORM, "4611686018427387904", "64 bits"]),
    (setting([21], NORM, "shape"), [NORM, "= 42 bytes", "span 40"]),
    (setting([4, 5], NORM, "shape"), [NORM, "F16 [4, 5]", "config.json says F16 [20]", "mixes two models"]),
    (setting([0, 40, 80], NORM, "data_offsets"), [NORM, "two data_offsets"]),
    (setting([40, 0], NORM, "data_offsets"), [NORM, "40 and 0"]),
    (setting([-40, 0], NORM, "data_offsets"), [NORM, "-40"]),
    (setting([2**62, 2**62 + 40], NORM, "data_offsets"), [NORM, "cut short"]),
    (setting([0.0, 40.0], NORM, "data_offsets"), [NORM, "data_offsets"]),
    (setting(None, NORM), [NORM, "not described"]),
    (setting(1, NORM, "extra"), [NORM, "not described"]),
    (lambda h: h.update({"other": h.pop(NORM)}), [f'"{NORM}" is missing']),
    (lambda h: h.update({"\x1b[31mred": h.pop(NORM)}), [f'"{NORM}" is missing']),
]


@pytest.mark.parametrize(("edit", "parts"), HEADERS)
def test_header_is_refused(edit: Callable[[Any], None], parts: list[str], single: Path) -> None:
    edit_header(weight_file(single), edit)
    refused(single, *parts)


def test_means_of_norms_are_checked(tmp_path: Path) -> None:
    name = "model.layers.1.post_attention_layernorm.mean"
    folder = write_checkpoint(tmp_path / "m", **SMALL, means=True)
    assert _C.inspect(str(folder))["norm_bytes"] == 2 * 5 * 20 * 2
    tensors = read_tensors(folder)
    for value in (np.nan, np.inf):
        spoilt = tensors[name].copy()
        spoilt[3] = value
        write_safetensors(weight_file(folder), tensors | {name: spoilt})
        refused(folder, f"{name}[3] in model.safetensors is", "expected a finite number")
    write_safetensors(weight_file(folder), tensors | {name: tensors[name][:19]})
    refused(folder, name, "F16 [19]", "F16 [20]")
    write_safetensors(weight_file(folder), {n: t for n, t in tensors.items() if n != name})
    refused(folder, f'"{name}" is missing')
    write_safetensors(weight_file(folder), tensors)
    edit_config(folder, setting(1, "quantization_config", "means"))
    refused(folder, "quantization_config.means is 1, expected true or false")
    edit_config(folder, setting(False, "quantization_config", "means"))
    refused(folder, ".mean", "is not part of the model")


def test_file_that_is_cut_short_empty_or_something_else(single: Path) -> None:
    path = single / "model.safetensors"
    whole = path.read_bytes()
    header, rest = split_header(path)
    path.write_bytes(whole[:-1])
    refused(single, "model.safetensors", "cut short")
    path.write_bytes(whole + b"\0")
    refused(single, "its header describes")
    path.write_bytes(b"")
    refused(single, "model.safetensors is empty")
    path.write_bytes(whole[:7])
    refused(single, "has 7 bytes")
    path.write_bytes(b"<!DOCTYPE html><html>Not found</html>")
    refused(single, "no safetensors file")
    write_header(path, json.dumps(header).encode(), rest, length=2**64 - 1)
    refused(single, "18446744073709551615")
    write_header(path, b" " * (17 << 20), rest)
    refused(single, "at most 16777216")
    write_header(path, b"[]", rest)
    refused(single, "no JSON object")
    text = json.dumps(header)
    write_header(path, (text[:-1] + ", " + json.dumps({NORM: header[NORM]})[1:]).encode(), rest)
    refused(single, f'the key "{NORM}" twice')
    padding = b" " * (1 + -len(text) % 2)  # an odd header: every element of two bytes and more is misaligned
    path.write_bytes((len(text) + len(padding)).to_bytes(8, "little") + text.encode() + padding + rest)
    refused(single, "needs a multiple of")


def test_folder_without_a_part(single: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "No such file")
    refused(single / "config.json", "is not a folder")
    (single / INDEX).write_text("{}")
    refused(single, "has both", INDEX)
    (single / "model.safetensors").unlink()
    refused(single, "no weight_map")
    (single / INDEX).unlink()
    refused(single, "weights are missing")
    (single / "model.safetensors").mkdir()
    refused(single, "is not a file")
    (single / "model.safetensors").rmdir()
    os.mkfifo(single / "model.safetensors")
    refused(single, "is not a file")
    (single / "config.json").unlink()
    refused(single, "no config.json")


# --- tensors ----------------------------------------------------------------------------------------------------------


def element(name: str, index: tuple[int, ...], value: float) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][index] = value

    return edit


def replaced(name: str, value: np.ndarray) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


DOWN_NAME = "model.layers.1.mlp.down_proj"
TENSORS: list[tuple[Callable[[Tensors], None], list[str]]] = [
    (
        replaced(CODES, np.zeros((3, 3, 24), "<u4")),
        [f"{CODES} is U32 [3, 3, 24] in model.safetensors", "config.json says U32 [3, 2, 24]"],
    ),
    (replaced(CODES, np.zeros((3, 2, 24), "<f4")), [f"{CODES} is F32 [3, 2, 24]", "says U32"]),
    (replaced(f"{DOWN_NAME}.scales", np.ones(32, "<f2")), ["scales is F16 [32]", "F16 [1, 32]"]),
    (replaced(f"{DOWN_NAME}.scales", np.zeros((2, 32), "<f2")), ["2 groups", "3 tiles of 48 inputs"]),
    (replaced(f"{DOWN_NAME}.scales", np.zeros((48, 32), "<f2")), ["48 groups"]),
    (replaced(f"{DOWN_NAME}.levels", np.arange(16, dtype="i1")), ["levels is I8 [16]", "I8 [8]"]),
    (without(CODES), [f'"{CODES}" is missing']),
    (without(f"{DOWN_NAME}.bias"), [f'"{DOWN_NAME}.bias" is missing']),
    (replaced("lm_head.bias", np.zeros(37, "<f4")), ['"lm_head.bias" in model.safetensors', "not part of the model"]),
    (replaced("model.layers.2.input_layernorm.weight", np.ones(20, "<f2")), ["model.layers.2.", "not part of"]),
    (element(f"{DOWN_NAME}.scales", (0, 5), np.nan), [f"{DOWN_NAME}.scales[0, 5] in model.safetensors is nan"]),
    (element(f"{DOWN_NAME}.scales", (0, 5), np.inf), ["scales[0, 5]", "is inf"]),
    (element(f"{DOWN_NAME}.scales", (0, 5), -0.5), ["scales[0, 5]", "is -0.5", "not negative"]),
    (element(f"{DOWN_NAME}.scales", (0, 25), 0.5), ["scales[0, 25]", "is 0.5", "padding"]),
    (element(f"{DOWN_NAME}.levels", (0,), -128), ["levels[0]", "is -128", "-127 to 127"]),
    (element(f"{DOWN_NAME}.levels", (3,), 127), ["levels[4]", "after 127", "increase"]),
    (element(f"{DOWN_NAME}.bias", (7,), np.nan), ["bias[7]", "is nan"]),
    (element(NORM, (19,), np.inf), [f"{NORM}[19]", "is inf"]),
]


@pytest.mark.parametrize(("edit", "parts"), TENSORS)
def test_tensor_is_refused(edit: Callable[[Tensors], None], parts: list[str], single: Path) -> None:
    tensors = read_tensors(single)
    edit(tensors)
    write_safetensors(single / "model.safetensors", tensors)
    refused(single, *parts)


# --- the index of shards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/etc/passwd",
        "/tmp/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "..",
        "",
        ".safetensors",
        "config.json",
        "a\0.safetensors",
        "C:x.safetensors",
        "x" * 300 + ".safetensors",
        None,
        3,
    ],
)
def test_index_names_files_in_its_folder_only(file: Any, sharded: Path) -> None:
    edit_json(sharded / INDEX, setting(file, "weight_map", NORM))
    refused(sharded, INDEX, NORM, "expected the")


def test_index_and_shards_agree(sharded: Path) -> None:
    index = (sharded / INDEX).read_text()
    first, second = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2))
    first_name = next(name for name, file in json.loads(index)["weight_map"].items() if file == first)

    edit_json(sharded / INDEX, setting(second, "weight_map", first_name))
    refused(sharded, first_name, first, f"lists it in {second}")
    edit_json(sharded / INDEX, without("weight_map", first_name))
    refused(sharded, first_name, f"in {first} but not in")
    (sharded / INDEX).write_text(index)
    edit_json(sharded / INDEX, setting(second, "weight_map", "ghost"))
    refused(sharded, '"ghost" is not in ' + second)
    edit_json(sharded / INDEX, setting("model-00009-of-00003.safetensors", "weight_map", "ghost"))
    refused(sharded, "model-00009-of-00003.safetensors", "incomplete")
    (sharded / INDEX).write_text(index)

    shard = {name: value for name, value in read_tensors(sharded).items() if f'"{name}": "{second}"' in index}
    twice = read_tensors(sharded)[first_name]
    write_safetensors(sharded / second, shard | {first_name: twice})
    refused(sharded, first_name, second, f"lists it in {first}")


# --- anything else ----------------------------------------------------------------------------------------------------


def test_two_hundred_broken_checkpoints(templates: tuple[Path, Path], tmp_path: Path) -> None:
    """Each is refused with a sentence or is still a checkpoint; tests/test_sanitizers.py repeats this under ASan."""
    outcomes = {"refused": 0, "loaded": 0}
    for folder, change in broken_copies(list(templates), tmp_path, 200).items():
        try:
            _C.inspect(str(folder))
            outcomes["loaded"] += 1
        except Error as error:
            outcomes["refused"] += 1
            assert re.fullmatch(r"[^\x00-\x1f]{20,900}", str(error)), change
    assert outcomes["refused"] >= 120 and outcomes["loaded"] >= 5, outcomes

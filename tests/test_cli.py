"""The command line on the plain-Python engine: what goes to stdout and stderr, exit codes, and what --json holds."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import fake_native
from halfturn import bench, cli, command, console, options
from halfturn.error import Error

TESTS = Path(__file__).parent


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """run.run("generate", "MODEL", ...): the command on a model that answers "Hello there"; .loaded: settings."""
    from halfturn.model import Model

    loaded: list[dict[str, Any]] = []

    def load(path: str, **settings: Any) -> Any:
        if path != "MODEL":
            raise Error(f"{path} is not a folder")
        loaded.append(settings)
        return fake_native.load(tmp_path / "model", "Hello there")

    monkeypatch.setattr(Model, "load", load)

    def invoke(*arguments: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(cli.main, arguments, input=stdin)

    return SimpleNamespace(run=invoke, loaded=loaded)


def only_json(result: Result) -> dict[str, Any]:
    """The one object on stdout."""
    assert result.stdout.endswith("\n") and result.stdout.count("\n") == 1
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


def test_generate_streams_the_text_and_says_more_on_stderr(run: Any) -> None:
    result = run.run("generate", "MODEL", "--prompt", "Hi", "--seed", "1")
    assert result.exit_code == 0
    assert result.stdout == "Hello there\n"
    assert "12 tokens" in result.stderr and "stop" in result.stderr


def test_generate_json_has_the_fields_of_the_manual(run: Any) -> None:
    value = only_json(run.run("generate", "MODEL", "--prompt", "Hi", "--max-tokens", "5", "--json"))
    assert value["text"] == "Hello"
    assert value["tokens"] == 5 == len(value["token_ids"])
    assert value["finish_reason"] == "length"
    assert value["prompt_tokens"] == 2
    assert value["time_to_first_token_s"] > 0
    assert value["decode_tokens_per_second"] > 0


def test_generate_reads_stdin_or_a_file(run: Any, tmp_path: Path) -> None:
    assert only_json(run.run("generate", "MODEL", "--json", stdin="four"))["prompt_tokens"] == 4
    file = tmp_path / "prompt"
    file.write_text("seven77")
    assert only_json(run.run("generate", "MODEL", "--json", "--prompt-file", str(file)))["prompt_tokens"] == 7
    assert only_json(run.run("generate", "MODEL", "--json", "--prompt-file", "-", stdin="é"))["prompt_tokens"] == 2


def test_generate_chat_uses_the_template(run: Any) -> None:
    plain = only_json(run.run("generate", "MODEL", "--prompt", "Hi", "--json"))
    chat = only_json(run.run("generate", "MODEL", "--prompt", "Hi", "--chat", "--json"))
    system = only_json(run.run("generate", "MODEL", "--prompt", "Hi", "--chat", "--system", "Be brief", "--json"))
    assert plain["prompt_tokens"] < chat["prompt_tokens"] < system["prompt_tokens"]


def test_engine_options_reach_the_model(run: Any) -> None:
    flags = ["--threads", "3", "--mode", "f16", "--kv-bits", "8,4", "--context", "99", "--device", "cpu"]
    run.run("generate", "MODEL", "--prompt", "Hi", *flags)
    asked = {"threads": 3, "mode": "f16", "kv_bits": (8, 4), "context": 99, "device": "cpu"}
    assert run.loaded == [asked | {"kv_tokens": 99}]


def test_commands_of_one_request_reserve_one_context(run: Any) -> None:
    run.run("chat", "MODEL", stdin="")
    run.run("generate", "MODEL", "--prompt", "Hi")
    assert [settings["kv_tokens"] for settings in run.loaded] == [4096, 4096]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "MODEL", "--prompt", "a", "--prompt-file", "b"], "not both"),
        (["generate", "MODEL", "--prompt", "a", "--system", "b"], "--system needs --chat"),
        (["generate", "MODEL", "--prompt", "a", "--kv-bits", "3"], "'3' is not 16, 8 or 4"),
        (["generate", "MODEL", "--prompt", "a", "--max-tokens", "0"], "--max-tokens"),
        (["generate"], "Missing argument 'MODEL'"),
        (["generat", "MODEL"], "No such command 'generat'"),
        (["bench", "MODEL", "--batch", "1,x"], "not a list of different batch sizes"),
        (["eval", "perplexity", "MODEL"], "Missing option '--text'"),
    ],
)
def test_wrong_usage_exits_2(run: Any, arguments: list[str], message: str) -> None:
    result = run.run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert message in only_json(run.run(*arguments, "--json"))["error"]


def test_a_failure_is_one_sentence_and_exit_1(run: Any) -> None:
    result = run.run("generate", "gone", "--prompt", "Hi")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "error: gone is not a folder\n")
    result = run.run("generate", "gone", "--prompt", "Hi", "--json")
    assert result.exit_code == 1
    assert only_json(result) == {"error": "gone is not a folder"}


def test_a_sampling_value_out_of_range_is_named(run: Any) -> None:
    result = run.run("generate", "MODEL", "--prompt", "Hi", "--top-p", "2")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: top_p is 2.0")


def test_a_prompt_that_is_not_utf8_is_refused(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompt"
    file.write_bytes(b"a\xff")
    result = run.run("generate", "MODEL", "--prompt-file", str(file))
    assert result.exit_code == 1
    assert "not UTF-8 text: byte 1" in result.stderr


def test_a_prompt_of_undecodable_bytes_is_refused(run: Any) -> None:
    result = run.run("generate", "MODEL", "--prompt", "a\udcff")  # how Python passes the byte 255 of a command line
    assert result.exit_code == 1
    assert "--prompt is not UTF-8 text: character 1" in result.stderr


def test_chat_without_a_template_is_refused_at_once(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    monkeypatch.setattr(fake_native, "write_tokenizer", partial(fake_native.write_tokenizer, chat_template=None))
    result = run.run("chat", "MODEL", stdin="Hi\n")
    assert result.exit_code == 1
    assert "template" in result.stderr and result.stdout == ""


def test_doctor_exits_with_1_where_the_engine_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "halfturn._C", None)
    monkeypatch.delattr("halfturn._C", raising=False)
    result = CliRunner().invoke(cli.main, ["doctor", "--json"])
    assert result.exit_code == 1
    assert "compiled engine can't be loaded" in only_json(result)["problems"][0]


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (Error("it broke"), 1, "error: it broke\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (click.Abort(), 130, "stopped\n"),
        (MemoryError(), 1, "out of memory"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 1, "error: x.txt: No such file or directory\n"),
        (ValueError("odd"), 1, "unexpected ValueError: odd"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, "pip install 'halfturn[convert]'"),
        (ModuleNotFoundError("No module named 'torch'", name="torch.nn"), 1, "pip install 'halfturn[convert]'"),
        (ModuleNotFoundError("No module named 'fastap'", name="fastap"), 1, "unexpected ModuleNotFoundError"),
    ],
)
def test_exit_codes(raised: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise raised

    assert command.exit_code(fail, as_json=False, debug=False) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err and "Traceback" not in err
    assert command.exit_code(fail, as_json=True, debug=False) == code
    assert list(json.loads(capsys.readouterr().out)) == ["error"]


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("odd")

    assert command.exit_code(fail, as_json=True, debug=True) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"].startswith("unexpected ValueError: odd")
    assert err.startswith("Traceback") and "in fail" in err and "\nerror: unexpected ValueError: odd" in err


def test_help_lists_every_command_without_importing_the_converter() -> None:
    code = (
        "import sys; from halfturn.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'halfturn.converter.cli', 'numpy', 'fastapi', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("bench", "chat", "convert", "doctor", "eval", "generate", "info", "serve"):
        assert f"\n  {name} " in done.stdout
    assert done.stdout.endswith("\n[]\n")


@pytest.mark.parametrize("name", ["generate", "chat", "info", "eval", "bench", "serve", "doctor"])
def test_every_command_has_help(name: str) -> None:
    result = CliRunner().invoke(cli.main, [name, "--help"])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: halfturn {name}")


def test_convert_without_its_libraries_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails as if it were not installed
    for name in [name for name in sys.modules if name.startswith("halfturn.converter")]:
        monkeypatch.delitem(sys.modules, name)
    for arguments in (["convert", "a", "b"], ["eval", "kl", "a", "--reference", "b"]):
        result = CliRunner().invoke(cli.main, arguments)
        assert result.exit_code == 1
        assert "pip install 'halfturn[convert]'" in result.stderr


@pytest.mark.parametrize(
    ("generation_config", "given", "expected"),
    [
        ({}, {}, {"temperature": 0.7, "top_p": 0.95}),
        ({"temperature": 0.3}, {}, {"temperature": 0.3, "top_p": 0.95}),
        ({"top_p": 0.8}, {}, {"temperature": 0.7, "top_p": 0.8}),
        ({"temperature": None, "top_p": 1.0}, {}, {"temperature": 0.7, "top_p": 1.0}),
        ({"do_sample": False}, {}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.6}, {}, {"temperature": 0.0}),
        ({"do_sample": False}, {"temperature": 0.5}, {"temperature": 0.5}),
        ({"temperature": 0.3, "top_k": 5}, {"temperature": 0.0, "top_k": None}, {"temperature": 0.0, "top_k": 5}),
        ({}, {"stop": ("a", "b"), "ignore_eos": None, "seed": 4}, {"stop": ("a", "b"), "seed": 4, "ignore_eos": False}),
        ({}, {"stop": ()}, {"stop": ()}),
    ],
)
def test_sampling_settings_prefer_the_command_line_then_the_model(
    generation_config: dict[str, Any], given: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    model = fake_native.load(tmp_path)
    model.generation_config = generation_config
    params = options.sampling_params(given, model)
    assert {name: getattr(params, name) for name in expected} == expected


def test_perplexity_command(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np = pytest.importorskip("numpy")
    losses = lambda self, items: np.zeros(sum(len(item.tokens) - 1 for item in items))  # noqa: E731
    monkeypatch.setattr(fake_native.Model, "nll", losses, raising=False)
    text = tmp_path / "text"
    text.write_text("x" * 100)
    value = only_json(run.run("eval", "perplexity", "MODEL", "--text", str(text), "--context", "32", "--json"))
    assert value == {"perplexity": 1.0, "tokens": 93, "windows": 3, "context": 32}
    assert (run.loaded[0]["context"], run.loaded[0]["kv_tokens"]) == (32, 32)
    shown = run.run("eval", "perplexity", "MODEL", "--text", str(text), "--context", "32", "--windows", "2")
    assert shown.stdout == "perplexity 1.0000  (62 predictions, 2 windows)\n"


def test_kl_reserves_one_window(run: Any) -> None:
    pytest.importorskip("torch")
    result = run.run("eval", "kl", "MODEL", "--reference", "/nowhere")
    assert result.exit_code == 1 and "/nowhere" in result.stderr
    assert (run.loaded[0]["context"], run.loaded[0]["kv_tokens"]) == (512, 512)


def test_bench_command(run: Any) -> None:
    flags = ["--prompt-tokens", "40", "--new-tokens", "8", "--batch", "1,2", "--repeat", "2"]
    value = only_json(run.run("bench", "MODEL", *flags, "--json"))
    assert value["prefill_tokens_per_second"] > 0 and value["load_seconds"] > 0
    assert value["peak_rss_bytes"] > 10_000_000
    assert value["device"] == "cpu (fake)" and value["threads"] == 1
    assert [row["batch"] for row in value["decode"]] == [1, 2]
    for row in value["decode"]:
        assert row["weight_bytes_per_token"] == 1000 / row["batch"]
        # Bytes read a second over the bandwidth: both come from the same median.
        expected = row["tokens_per_second"] * row["weight_bytes_per_token"] / 1e9
        assert row["bandwidth_fraction"] == pytest.approx(expected)
    assert run.loaded[0]["kv_tokens"] == 2 * 64  # whole pages for each sequence
    assert "decode, batch 2" in run.run("bench", "MODEL", *flags).stdout


def test_bench_refuses_more_than_the_cache_holds(run: Any) -> None:
    result = run.run("bench", "MODEL", "--prompt-tokens", "200", "--new-tokens", "50", "--batch", "9")
    assert result.exit_code == 1
    assert "need 72 pages of the KV cache, it has 64: use a smaller --batch" in result.stderr
    result = run.run("bench", "MODEL", "--prompt-tokens", "200", "--new-tokens", "100")
    assert "200 + 100 tokens don't fit the context of 256" in result.stderr


def test_serve_passes_its_options_on(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfturn.server import app

    calls: list[Any] = []

    def serve(path: str, *, settings: app.Settings, on_ready: Any, **options: Any) -> None:
        calls.append((path, settings, options))
        on_ready("http://127.0.0.1:9", "tiny")

    monkeypatch.setattr(app, "serve", serve)
    value = only_json(run.run("serve", "MODEL", "--port", "9", "--api-key", "k", "--cors-origin", "a", "--json"))
    assert value == {"url": "http://127.0.0.1:9", "model": "tiny"}
    path, settings, options = calls[0]
    assert path == "MODEL" and settings == app.Settings(api_key="k", cors_origins=("a",))
    assert options["port"] == 9 and options["host"] == "127.0.0.1" and options["max_batch"] == 32


@pytest.mark.parametrize(
    ("environment", "all_of_them", "colours"),
    [
        ({}, True, True),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"TERM": "dumb"}, False, False),
    ],
)
def test_escape_sequences_go_where_they_are_wanted(
    environment: dict[str, str], all_of_them: bool, colours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    terminal, file = io.StringIO(), io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    assert (console.obeys(terminal), console.obeys(terminal, colours=True)) == (all_of_them, colours)
    assert not console.obeys(file)
    monkeypatch.setattr(sys, "stderr", terminal)
    with console.status("loading"):
        counter = console.Counter("window")
        counter(1, 2)
        counter.close()
    assert ("\x1b" in terminal.getvalue()) == all_of_them


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_json_says_the_same_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding, errors="replace")
    monkeypatch.setattr(sys, "stdout", stream)
    console.print_json({"text": "é 中 \ud83d"})
    stream.seek(0)
    assert json.loads(stream.read()) == {"text": "é 中 \ud83d"}


# ---- on the compiled engine


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of random codes: two layers, 3 bits in v_proj, 4 elsewhere, 8 in the embedding, 6 in the head."""
    pytest.importorskip("numpy")
    from checkpoints import write_checkpoint

    widths = {"v_proj": 3, "embed_tokens": 8, "lm_head": 6}
    folder = tmp_path_factory.mktemp("tiny")
    return str(write_checkpoint(folder, bits=lambda name: widths.get(name.split(".")[-1], 4), tokenizer=True))


def command_json(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli.main, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    return only_json(result)


def test_info_of_a_checkpoint(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = command_json("info", tiny)
    bits = {linear["name"]: linear["bits"] for linear in value["linears"]}
    assert bits["model.layers.1.self_attn.v_proj"] == 3 and bits["model.layers.0.mlp.down_proj"] == 4
    assert bits["model.embed_tokens"] == 8 and bits["lm_head"] == 6
    assert value["memory_bpw"] > 2
    monkeypatch.setattr("halfturn._C.cuda_problem", lambda: pytest.fail("a card was asked for"))
    shown = CliRunner().invoke(cli.main, ["info", tiny])
    assert "whole file" in shown.stdout and "embedding 8 bits, head 6 bits" in shown.stdout


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_info_counts_bits_as_the_converter_does(tied: bool, biases: bool, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from checkpoints import write_checkpoint
    from halfturn.converter.architectures import ModelConfig
    from halfturn.converter.write import bits_per_weight, plan_linears

    folder = write_checkpoint(tmp_path / "m", hidden=40, bits=3, biases=biases, means=True)
    stored = json.loads((folder / "config.json").read_text())
    fields = {name: stored[name] for name in ModelConfig.__dataclass_fields__ if name in stored}
    config = ModelConfig(**{**fields, "tie_word_embeddings": tied})
    sizes = bits_per_weight(
        config, plan_linears(config, dict.fromkeys(stored["quantization_config"]["linears"], 3)), True
    )
    stored["quantization_config"]["source_tied"] = tied
    (folder / "config.json").write_text(json.dumps(stored))
    value = command_json("info", str(folder))
    assert value["weights"] == config.parameters()
    assert value["decoder_bpw"] == pytest.approx(sizes["decoder"])
    assert value["file_bpw"] == pytest.approx(sizes["file"])


def test_info_shows_names_and_texts_as_they_are(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("m[v2]", "a[/b]"):
        shutil.copytree(tiny, name)
        config = json.loads(Path(name, "config.json").read_text())
        config["quantization_config"]["measured"] = {"text": "[/foo] [bold]\x1b[2J"}
        Path(name, "config.json").write_text(json.dumps(config))
        result = CliRunner().invoke(cli.main, ["info", name])
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.startswith(f"{name}  llama")
        assert "  text: [/foo] [bold][2J\n" in result.stdout


def test_info_bears_measurements_that_are_no_object(tiny: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["measured"] = ["fast"]
    (folder / "config.json").write_text(json.dumps(config))
    assert command_json("info", str(folder))["measured"] == {}
    assert CliRunner().invoke(cli.main, ["info", str(folder)]).exit_code == 0


def test_info_of_a_folder_whose_name_is_not_utf8(tiny: str, tmp_path: Path) -> None:
    name = tmp_path / os.fsdecode(b"no\xff")
    result = CliRunner().invoke(cli.main, ["info", str(name)])
    assert result.exit_code == 1
    assert "can't be opened" in result.stderr and "incompatible" not in result.stderr
    shutil.copytree(tiny, name)
    assert CliRunner().invoke(cli.main, ["info", str(name)]).exit_code == 0


def test_convert_shows_brackets_in_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from halfturn.converter import cli as converter_cli

    recipe = make_dataclass("Recipe", [])
    found = {"widths": {"model.layers.0.self_attn.q_proj": 4}}
    convert = SimpleNamespace(ConvertOptions=lambda **_: None, convert=lambda *_: found)
    monkeypatch.setitem(sys.modules, "halfturn.converter.convert", convert)
    monkeypatch.setitem(sys.modules, "halfturn.converter.recipe", SimpleNamespace(Recipe=recipe))
    monkeypatch.setattr(converter_cli, "summary", lambda result: "out[/x][v2]")
    result = CliRunner().invoke(cli.main, ["convert", "source", "out[/x][v2]"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith("\nout[/x][v2]\n")


def test_generate_is_the_same_twice_with_a_seed(tiny: str) -> None:
    flags = ["--prompt", "Once", "--max-tokens", "12", "--seed", "3", "--temperature", "1"]
    first, second = (command_json("generate", tiny, *flags) for _ in range(2))
    assert first["token_ids"] == second["token_ids"]
    assert first["tokens"] == len(first["token_ids"]) > 0


def test_perplexity_is_that_of_the_logits(tiny: str, tmp_path: Path) -> None:
    import numpy as np

    from halfturn.model import Model

    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog " * 4)
    value = command_json("eval", "perplexity", tiny, "--text", str(text), "--context", "40")
    model = Model.load(tiny, context=40)
    tokens = model.tokenizer.encode(text.read_text())
    losses = []
    for start in range(0, len(tokens) // 40 * 40, 40):
        window = tokens[start : start + 40]
        logits = model.native.logits([model.backend.Item(window, 0, [0, 1], None)]).astype(np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [-logits[i, window[i + 1]] for i in range(39)]
    assert value["tokens"] == len(losses)
    assert value["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


def test_bench_of_a_checkpoint(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BANDWIDTH_MEGABYTES", 16)
    flags = ["--prompt-tokens", "20", "--new-tokens", "4", "--batch", "1,3", "--repeat", "1"]
    value = command_json("bench", tiny, *flags)
    assert value["prefill_tokens_per_second"] > 0
    one, three = value["decode"]
    assert one["weight_bytes_per_token"] == pytest.approx(3 * three["weight_bytes_per_token"])
    assert one["bandwidth_fraction"] > 0 and three["tokens_per_second"] > 0


def test_doctor_names_what_would_run() -> None:
    value = command_json("doctor")
    assert value["cpu"]["isa"] in value["cpu"]["available"]
    assert value["threads"] >= 1 and value["memory"]["total"] > 0
    assert value["cpu"]["isa"] in value["would_run"]
    assert value["problems"] == []

"""The command line of `dparallel serve`: options, keys, ports."""

from __future__ import annotations

import errno
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import MODEL
from dparallel import registry
from dparallel.cli import app
from dparallel.registry import VERIFIER
from dparallel.serving import runner
from dparallel.serving.runner import listen, unusable
from dparallel.serving.settings import KEY_VARIABLE, ServerSettings, find_keys, read_keys
from typer.testing import CliRunner

import dparallel_ext as dx


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--policy", "x"), "policy: expected"),
        (("--model", "nowhere"), "model: 'nowhere'"),
        (("--lanes", "0"), "lanes: expected"),
        (("--cache", "all"), "cache: expected"),
        (("--api-key", "a", "--api-key-file", "b"), "api_key: not beside"),
        (("--api-key-file", "nowhere"), "nowhere"),
        (("--api-key", ""), "api_key: expected a key"),
        (("--api-key", "  "), "api_key: expected a key"),
        (("--api-key", "--fp8"), "api_key: expected a key, got the option --fp8"),
        (("--api-key-file", ""), "api_key_file: "),
        (("--host", ""), "host: expected a name or an address (0.0.0.0: every one), got an empty one"),
        (("--name", " "), "name: expected the model's name, got an empty one"),
        (("--model", ""), "model: "),
        (("--device", ""), "device: expected"),
        (("--dtype", "fp8"), "dtype: expected auto, float32, bfloat16, float16, got 'fp8'"),
        (("--port", "99999"), "port: expected 0 to 65535, got 99999"),
        (("--port", "-1"), "port: expected 0 to 65535, got -1"),
        (("--host", "a..b"), "host: 'a..b' does not resolve"),
        (("--host", "192.0.2.1"), "host: '192.0.2.1' is no address of this machine"),
        (("--log-level", "loud"), "log_level: expected one of"),
        (("--grace", "-1"), "grace: expected seconds >= 0, got -1"),
        (("--max-choices", "0"), "max_choices: expected a whole number >= 1, got 0"),
        (("--grace", "nan"), "grace: expected seconds >= 0, got nan"),
        (("--grace", "inf"), "grace: expected seconds >= 0, got inf"),
        (("--max-length", "0"), "max_length: expected a whole number >= 1, got 0"),
        (
            ("--max-length", str(2**20 + 1)),
            "max_length: expected a whole number <= 1048576, got 1048577",
        ),
        (("--max-body", "-1"), "max_body: expected a whole number >= 1, got -1"),
        (("--max-connections", "1"), "max_connections: expected a whole number >= 2, got 1"),
        (("--max-connections", "1000000"), "max_connections: expected at most"),
        (("--max-waiting", "0"), "max_waiting: expected a whole number >= 1, got 0"),
        (("--lanes", str(10**20)), "lanes"),
        (("--verifier", "nobody"), "verifier: 'nobody' is neither"),
        (("--verifier", MODEL), "verifier: expected an autoregressive model, got builtin:student, a diff"),
        (("--verifier", VERIFIER, "--policy", "one"), "policy: not together with --verifier, got 'one'"),
        (("--verifier", VERIFIER, "--cache", "none"), "cache: not together with --verifier, got 'none'"),
        (("--verifier", VERIFIER, "--draft-size", "2"), "draft_size: not together with --verifier, got 2"),
        (("--policy", "credit", "--draft-size", "2"), "draft_size: goes with policy rows alone"),
        (("--policy", "one", "--draft-size", "-1"), "draft_size: expected a whole number >= 0, got -1"),
        (("--verifier", VERIFIER, "--mixture", "2"), "mixture: expected a number from 0 to 1, got 2"),
        (("--window", "2"), "window: belongs to --verifier, got 2"),
        (
            ("--verifier", VERIFIER, "--model", "builtin:causal"),
            "verifier: belongs to masked diffusion; builtin:causal is autoregressive",
        ),
        (("--block-length", "0"), "block_length: expected a whole number >= 1, got 0"),
        (("--mask-id", "-1"), "mask_id: expected an id below"),
        (("--policy", "confidence:nan"), "policy: expected"),
        (("--policy", "steps:0"), "policy: expected"),
        (("--cors-origin", "example.org"), "cors_origin: expected '*' or an origin"),
        (("--cors-origin", "https://example.org/page"), "cors_origin: expected '*' or an origin"),
        (("--cors-origin", "https://Example.org"), "cors_origin: expected '*' or an origin"),
    ],
)
def test_bad_options_are_one_line(args: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        raise AssertionError("it serves")

    monkeypatch.setattr(runner.Server, "run", run)
    found = CliRunner().invoke(app, ["serve", *args])
    assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
    assert said in found.stderr


def test_more_tokens_than_positions_bring_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.Server, "run", lambda *_: None)
    with pytest.warns(UserWarning, match="max_length: 257, but student is made for 256 positions"):
        CliRunner().invoke(app, ["serve", "--port", "0", "--max-length", "257", "--name", "student"])


def test_a_diffusion_model_guesses_its_next_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def run(self: runner.Server, _: Any) -> None:
        (served,) = self.service.models.values()
        for _ in range(2):
            found.append(served.engine.submit([5, 6, 7], gen_length=20, eos_id=-1).result(60))
        assert served.engine.stats.accepted_tokens > 0

    monkeypatch.setattr(runner.Server, "run", run)
    done = CliRunner().invoke(app, ["serve", "--port", "0", "--policy", "one", "--draft-size", "3"])
    assert done.exit_code == 0, done.output
    model = registry.load(MODEL)[0]
    plain = dx.decode(model, [5, 6, 7], gen_length=20, cache="dual")
    assert all(each.tokens == plain.responses[0].tolist() and each.nfe < 20 for each in found)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf\r\n", b"# nothing\r\n  # yet"])
def test_an_empty_file_of_keys_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ValueError, match=r"api_key_file: .* holds no key"):
        read_keys(tmp_path / "keys")


def test_a_file_of_keys_as_people_write_it(tmp_path: Path) -> None:
    """With a byte order mark, of Windows, with blanks and comments."""
    file = tmp_path / "keys"
    file.write_bytes("\ufeffsk-1\r\n\r\n# of the tests\r\n  sk-2\t # mine\r\nsk#3 \rключ".encode())
    assert read_keys(file) == ("sk-1", "sk-2", "sk#3", "ключ")
    for content, said in ((b"a\x00b", "key 1 has others"), (b"\xff\xfea\x00", "is not UTF-8 text")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            read_keys(file)
    with pytest.raises(ValueError, match="api_key_file"):
        read_keys(tmp_path)


def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("file")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert find_keys(None, None) == ()
    monkeypatch.setenv(KEY_VARIABLE, " sk-1\nsk-2 ")
    assert find_keys(None, None) == ("sk-1", "sk-2")
    assert find_keys(" given ", None) == ("given",)
    assert find_keys(None, tmp_path / "keys") == ("file",)
    monkeypatch.setenv(KEY_VARIABLE, " ")
    found = CliRunner().invoke(app, ["serve"])
    assert (found.exit_code, found.stderr) == (
        2,
        "error: DPARALLEL_API_KEY: expected a key, got an empty one\n",
    )


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = CliRunner().invoke(app, ["serve", "--port", str(port)])
    assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
    assert f"port: {port} of '127.0.0.1' is in use already" in found.stderr


@pytest.mark.parametrize("fails", ["the second model", "the server"])
def test_what_fails_leaves_no_engine_behind(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    made: list[dx.Engine] = []
    make = runner.make_engine

    def recorded(*arguments: Any) -> dx.Engine:
        made.append(make(*arguments))
        made[-1].submit([5, 6], gen_length=16)
        return made[-1]

    def no_server(*_: Any) -> Any:
        raise RuntimeError("no server")

    monkeypatch.setattr(runner, "make_engine", recorded)
    monkeypatch.setattr(runner, "make_server", no_server)
    config = dx.DecodeConfig(cache="window" if fails == "the second model" else None, gen_length=16)
    models = [
        runner.Served(name, MODEL, each, registry.Loading())
        for name, each in (("a", dx.DecodeConfig(gen_length=16)), ("b", config))
    ]
    error, said = (ValueError, "cache: ") if fails == "the second model" else (RuntimeError, "no server")
    settings = ServerSettings(max_length=64)
    with pytest.raises(error, match=said):
        runner.run(models, settings, host="127.0.0.1", port=0, log_level="error", lanes=2, max_waiting=4)
    assert len(made) == 1 + (fails == "the server")
    for engine in made:
        assert engine.closed
        engine.thread.join(60)  # Python may still be putting it away
        assert not engine.thread.is_alive()
        assert engine.stats.active == engine.stats.waiting == 0


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_time_for_requests_that_none_could_keep_is_named(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"body_seconds: expected seconds >= 0, got {seconds}"):
        ServerSettings(body_seconds=seconds)


def test_a_port_on_which_another_listens_first_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that begin at once both get the port, and the slower one learns it with its model loaded."""
    (faster,) = listen("127.0.0.1", 0)
    with faster:
        port = faster.getsockname()[1]
        (slower,) = listen("127.0.0.1", port)
        faster.listen()
        monkeypatch.setattr(runner, "listen", lambda *_: [slower])
        found = CliRunner().invoke(
            app, ["serve", "--model", MODEL, "--log-level", "error", "--port", str(port)]
        )
    assert found.exit_code == 2
    assert found.stderr.splitlines()[-1].startswith(f"error: port: {port} of '127.0.0.1' is in use already")
    assert "Traceback" not in found.output


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import dparallel

    monkeypatch.delattr(dparallel, "serving")
    for name in [name for name in sys.modules if name.startswith("dparallel.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    found = CliRunner().invoke(app, ["serve"])
    assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
    assert 'no fastapi; pip install "dparallel-ext[cli,serve]"' in found.stderr


def _addresses(host: str) -> list[Any] | str:
    """The addresses that `listen` binds for a host, or what it says."""
    try:
        sockets = listen(host, 0)
    except ValueError as error:
        return str(error).replace(repr(host), "it")
    for one in sockets:
        one.close()
    return [one.family for one in sockets]


def test_addresses_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one that the machine has, at one port; names that do not resolve are named."""
    for host in ("localhost", "127.0.0.1", ""):
        sockets = listen(host, 0)
        assert len({one.getsockname()[1] for one in sockets}) == 1
        assert any(one.family == socket.AF_INET for one in sockets)
        for one in sockets:
            one.close()
    if socket.has_ipv6:  # as in a URL, where a machine has such addresses
        plain, bracketed = (_addresses(host) for host in ("::1", "[::1]"))
        assert plain == bracketed

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ValueError, match=r"host: 'nowhere' does not resolve \(.*not known"):
        listen("nowhere", 0)
    said = str(unusable("h", 80, OSError(errno.EACCES, "Permission denied")))
    assert said == "port: 80 of 'h' cannot be had (Permission denied)"


def test_a_file_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fields are the engine's and the requests'; options stand instead of them."""
    found: list[dx.DecodeConfig] = []

    def run(self: runner.Server, sockets: Any = None) -> None:
        found.extend(model.engine.config for model in self.service.models.values())

    monkeypatch.setattr(runner.Server, "run", run)
    file = tmp_path / "config.json"

    def serve(content: dict[str, Any], *options: str) -> dx.DecodeConfig:
        file.write_text(json.dumps(content))
        done = CliRunner().invoke(app, ["serve", "--port", "0", "--config", str(file), *options])
        assert done.exit_code == 0, done.output
        return found.pop()

    content = {
        "threshold": 0.8,
        "selector": "confidence",
        "min_commit": 2,
        "cache": "prefix",
        "block_length": 16,
    }
    config = serve(content)
    assert content.items() <= config.to_dict().items()
    assert (config.rule, config.gen_length) == (None, 64)
    config = serve(content, "--policy", "margin:0.5", "--block-length", "8", "--cache", "none")
    assert (config.rule, config.threshold, config.min_commit) == ("margin:0.5", None, 1)
    assert (config.block_length, config.cache) == (8, "none")
    config = serve({"gen_length": 20, "temperature": 0.5})
    assert (config.rule, config.gen_length, config.temperature) == ("entropy:0.5", 20, 0.5)
    for wrong, message in (
        ({"treshold": 0.5}, "config: {file}: expected fields of DecodeConfig, got 'treshold'. Did you mean"),
        ({"threshold": "x"}, "config: {file}: threshold: expected a number"),
        ({"cache": "block"}, "cache: expected"),
        ({"record": True}, "record: an engine keeps no trajectory"),
        ({"gen_length": [5, 6]}, "gen_length: expected a number or one for each of 1, got 2"),
    ):
        file.write_text(json.dumps(wrong))
        done = CliRunner().invoke(app, ["serve", "--port", "0", "--config", str(file)])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert message.format(file=file) in done.stderr


def test_several_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its name, with the options of its kind; an autoregressive one once for each drafter."""
    served: list[runner.Service] = []

    def run(self: runner.Server, sockets: Any = None) -> None:
        served.append(self.service)

    monkeypatch.setattr(runner.Server, "run", run)

    def serve(*options: str) -> Any:
        return CliRunner().invoke(app, ["serve", "--port", "0", *options])

    causal = ("--model", "builtin:causal", "--drafter", "plain", "--drafter", "ngram", "--draft-size", "4")
    done = serve(
        "--model", "builtin:teacher", "--model", MODEL, *causal, "--policy", "one", "--cache", "prefix"
    )
    assert done.exit_code == 0, done.output
    models = served.pop().models
    described = {name: (one.described["policy"], one.drafter) for name, one in models.items()}
    assert described == {
        "builtin:teacher": ("one", None),
        MODEL: ("one", None),
        "builtin:causal": (None, None),
        "builtin:causal+ngram": (None, "ngram"),
    }
    assert [one.engine.cache for one in models.values()] == ["prefix", "prefix", None, None]
    plain, drafted = models["builtin:causal"].engine, models["builtin:causal+ngram"].engine
    assert plain.model is drafted.model  # the weights are there once
    judged = ("--verifier", VERIFIER, "--mixture", "0.7", "--window", "4", "--lookahead", "32")
    done = serve("--model", "builtin:teacher", *judged, *causal)
    assert done.exit_code == 0, done.output
    models = served.pop().models
    assert [one.verifier for one in models.values()] == [VERIFIER, None, None]
    teacher = models["builtin:teacher"].engine
    assert (teacher.core.batch.mixture, teacher.core.batch.window, teacher.core.batch.lookahead) == (
        0.7,
        4,
        32,
    )
    named = ("--model", MODEL, "--model", MODEL, "--name", "a", "--name", "b")
    assert serve(*named, "--dtype", "float16").exit_code == 0
    assert [one.engine.model.dtype for one in served[-1].models.values()] == [torch.float16] * 2
    assert list(served.pop().models) == ["a", "b"]
    for options, said in (
        (("--model", MODEL, "--model", MODEL), f"name: two models are called {MODEL!r}; give each a --name"),
        (("--model", MODEL, "--name", "a", "--name", "b"), f"name: expected one for each of {MODEL}, got 2"),
        (("--model", MODEL, "--model", "nowhere"), "model: 'nowhere'"),
        (
            ("--model", "builtin:causal", "--drafter", "plain", "--drafter", "x"),
            "drafter: expected a Drafter",
        ),
        (
            ("--model", MODEL, "--model", "builtin:teacher", "--drafter", "ngram"),
            f"drafter: {MODEL} is a diff",
        ),
    ):
        done = serve(*options)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
        assert said in done.stderr

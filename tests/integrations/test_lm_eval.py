"""The lm-evaluation-harness's model. What needs the harness runs where it is installed."""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch
from conftest import ROOT
from dparallel import registry
from dparallel.integrations.arguments import batch_size_of
from dparallel.likelihood import log_likelihoods
from dparallel.toy import tasks
from test_likelihood import left_to_right, small

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.models import Model

HERE = Path(__file__).parent
STUDENT = "builtin:student"


def test_a_batch_size_of_0_is_none() -> None:
    assert batch_size_of(None, None) == 1
    assert batch_size_of("3", None) == 3
    with pytest.raises(ValueError, match="batch_size: expected a whole number >= 1 or 'auto', got 0"):
        batch_size_of(0, None)


def test_entry_point_names_a_class_that_is_there() -> None:
    """The group that the harness documents; the module is shipped."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    target = project["project"]["entry-points"]["lm_eval.models"]["dparallel"]
    module, _, name = target.partition(":")
    assert module.rpartition(".")[0] in setuptools.find_packages(ROOT / "python")
    source = ROOT / "python" / Path(*module.split(".")).with_suffix(".py")
    assert f"class {name}(" in source.read_text()


# --- the harness --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harness() -> Any:
    """Its `dparallel` integration."""
    pytest.importorskip("lm_eval")
    return importlib.import_module("dparallel.integrations.lm_eval")


@pytest.fixture(scope="module")
def make(harness: Any) -> Callable[..., Any]:
    return lambda **options: harness.DParallelLM(
        **{"pretrained": STUDENT, "batch_size": 8, "dtype": "float32", **options}
    )


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


PROBLEMS = list(itertools.islice(tasks.problems("held_out", 5), 8))


def responses(count: int, **options: Any) -> list[str]:
    """Of `decode`, one prompt after the other."""
    model, tokenizer = registry.load(STUDENT)
    texts = []
    for problem in PROBLEMS[:count]:
        prompt = torch.tensor(tokenizer.encode(problem.prompt).ids)
        out = dx.decode(model.float(), prompt, eos_id=1, **{"gen_length": 64, **options})
        texts.append(tokenizer.decode(out.responses[0][: int(out.kept[0])].tolist()))
    return texts


def test_requests_get_what_decode_gives(make: Any) -> None:
    """Of any lengths and arguments, in the order of the requests, each told to the cache as it ends."""
    model = make(policy="entropy:0.5", block_length=16, cache="dual", batch_size=4)
    told: dict[str, str] = {}
    model.cache_hook = SimpleNamespace(add_partial=lambda kind, args, res: told.__setitem__(args[0], res))
    found = model.generate_until([asked(p.prompt, {"until": []}) for p in PROBLEMS])
    assert found == responses(len(PROBLEMS), threshold=0.5, block_length=16, cache="dual")
    assert told == {p.prompt: text for p, text in zip(PROBLEMS, found, strict=True)}
    info = model.get_model_info()
    assert info["generated_tokens"] == sum(len(text.split()) for text in found)
    assert info["tokens_per_pass"] == info["generated_tokens"] / info["forward_passes"] > 2
    # `until` cuts the text wherever it lies; the policy may be the request's.
    options = {"until": [" .", "####"], "policy": "one", "temperature": 0.0, "max_gen_toks": 24}
    cut = model.generate_until([asked(p.prompt, options) for p in PROBLEMS[:3]])
    whole = responses(3, gen_length=24, block_length=16, cache="dual")
    assert cut == [text.split(" .")[0] for text in whole]
    assert model.generate_until([]) == []


def test_gen_length_is_the_arguments_then_the_tasks(make: Any) -> None:
    prompt = PROBLEMS[0].prompt
    few = make().generate_until([asked(prompt, {"max_gen_toks": 3}), asked(prompt, {"max_new_tokens": 5})])
    assert [len(text.split()) for text in few] == [3, 5]
    assert few[1].startswith(few[0].split()[0])
    (fixed,) = make(gen_length=7).generate_until([asked(prompt, {"max_gen_toks": 3})])
    assert len(fixed.split()) == 7


def test_the_harness_trusts_code_that_is_not_run(make: Any) -> None:
    """Its option --trust_remote_code, which some tasks' data need, is an argument of the model too."""
    asks = [asked(PROBLEMS[0].prompt, {"max_gen_toks": 3})]
    assert make(trust_remote_code=True).generate_until(asks) == make().generate_until(asks)


def test_samples_differ_between_repeats_and_not_between_runs(make: Any) -> None:
    options = {"do_sample": True, "temperature": 4.0, "policy": "one", "max_gen_toks": 12}
    requests = [asked(PROBLEMS[0].prompt, options)] * 3
    first = make(seed=1).generate_until(requests)
    assert len(set(first)) > 1
    assert first == make(seed=1, batch_size=1).generate_until(requests)
    assert first != make(seed=2).generate_until(requests)
    greedy = make().generate_until(
        [asked(PROBLEMS[0].prompt, {**options, "do_sample": False, "top_p": 0.5})] * 2
    )
    assert greedy[0] == greedy[1]
    # The most probable token alone, whatever the temperature.
    (only,) = make().generate_until([asked(PROBLEMS[0].prompt, {**options, "top_k": 1})])
    assert only == greedy[0]


def test_log_likelihood_requests(make: Any) -> None:
    """The Monte Carlo bound of the tokens behind the context; its trailing space goes to the continuation."""
    model = make(mc_num=8)
    problem, told = PROBLEMS[0], []
    model.cache_hook = SimpleNamespace(add_partial=lambda *given: told.append(given))
    requests = [asked(problem.prompt + " ", problem.response), asked("", "sam has 4 cups")]
    found = model.loglikelihood(requests)
    ids = [model.tokenizer.encode(text).ids for text in (problem.prompt, problem.response, "sam has 4 cups")]
    expected = log_likelihoods(model.model, [ids[0], []], ids[1:], samples=8)
    assert [one[0] for one in found] == pytest.approx([one.logprob for one in expected], abs=1e-3)
    assert [one[1] for one in found] == [one.greedy for one in expected]
    assert [(kind, args) for kind, args, _ in told] == [("loglikelihood", one.args) for one in requests]
    # Texts longer than the model: every token counts once.
    model.max_length = 24
    text = " ".join(p.response for p in PROBLEMS[:2])
    (rolling,) = model.loglikelihood_rolling([asked(text)])
    ids = model.tokenizer.encode(text).ids
    windows, at = [([], ids[:24])], 24
    while at < len(ids):
        end = min(at + 23, len(ids))
        windows.append((ids[end - 24 : at], ids[at:end]))
        at = end
    assert sum(len(part) for _, part in windows) == len(ids)
    parts = log_likelihoods(model.model, *zip(*windows, strict=True), samples=8, greedy=False)
    assert rolling == pytest.approx(sum(one.logprob for one in parts), abs=1e-3)
    assert told[-1] == ("loglikelihood_rolling", (text,), rolling)


def test_chat_templates(harness: Any, tmp_path: Path) -> None:
    """Written by the checkpoint's template, whose own special tokens are not added twice."""
    shutil.copytree(registry.directory_of(STUDENT), tmp_path, dirs_exist_ok=True)
    turns = "{% for m in messages %} {{ m['content'] }} .{% endfor %}"
    template = "{{ bos_token }}" + turns + "{% if add_generation_prompt %} now{% endif %}"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "[PAD]", "eos_token": "[EOS]", "chat_template": template})
    )
    model = harness.DParallelLM(str(tmp_path), batch_size=2)
    chat = [{"role": "user", "content": "sam has 4 cups"}]
    assert model.apply_chat_template(chat) == "[PAD] sam has 4 cups . now"
    begun = [*chat, {"role": "assistant", "content": " sam"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == "[PAD] sam has 4 cups . now sam"
    assert model.chat_template(True) == "[PAD] {content} . now"
    assert model.chat_template(False) is None
    assert model.prefix_token_id == 0
    assert model.tokenizer_name == str(tmp_path).replace("/", "__")
    with pytest.raises(ValueError, match="apply_chat_template: expected no name"):
        model.chat_template("tool_use")
    with pytest.raises(ValueError, match=r"apply_chat_template: .* has no chat template"):
        harness.DParallelLM(STUDENT).apply_chat_template(chat)


def test_the_bos_token_is_that_of_the_template(harness: Any, tmp_path: Path) -> None:
    """In special_tokens_map.json too, as in transformers."""
    shutil.copytree(registry.directory_of(STUDENT), tmp_path, dirs_exist_ok=True)
    template = "{{ bos_token }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "[PAD]"}}))
    model = harness.DParallelLM(str(tmp_path))
    assert model.apply_chat_template([{"role": "user", "content": "sam"}]) == "[PAD] sam"
    assert (model.bos_token, model.prefix_token_id) == ("[PAD]", 0)


@pytest.mark.parametrize("family", [models.SDAR, models.FastDLLM])
def test_block_causal_checkpoints(harness: Any, tmp_path: Path, family: type[Model]) -> None:
    """Decoded with the exact cache of blocks, and scored from left to right."""
    model = small(family, vocab_size=202, mask_token_id=201, eos_token_id=1, max_position_embeddings=128)
    model.config["model_type"] = {models.SDAR: "sdar", models.FastDLLM: "Fast_dLLM_Qwen"}[family]
    models.save(model, tmp_path)
    shutil.copy(registry.directory_of(STUDENT) / "tokenizer.json", tmp_path)
    loaded = harness.DParallelLM(str(tmp_path), policy="confidence:0.9", batch_size=3, gen_length=20)
    assert loaded.max_length == 128
    assert loaded.get_model_info()["cache"] == "block"
    found = loaded.generate_until([asked(p.prompt, {}) for p in PROBLEMS[:4]])
    encode, decode = loaded.tokenizer.encode, loaded.tokenizer.decode
    prompts = [encode(p.prompt).ids for p in PROBLEMS[:4]]
    rule: dict[str, Any] = {"selector": "confidence", "threshold": 0.9, "cache": "block", "eos_id": 1}
    for prompt, text in zip(prompts, found, strict=True):
        out = dx.decode(model, torch.tensor(prompt), gen_length=20, **rule)
        assert text == decode(out.responses[0][: min(20, int(out.kept[0]))].tolist())
    scores = loaded.loglikelihood([asked(p.prompt, " " + p.response) for p in PROBLEMS[:2]])
    for problem, prompt, score in zip(PROBLEMS, prompts, scores, strict=False):
        expected = left_to_right(model, prompt, encode(problem.response).ids)
        assert score[0] == pytest.approx(expected.logprob, abs=1e-3)


def test_special_tokens_and_long_contexts(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A special token among `until` ends a response, though it is no part of the text."""
    model = make(gen_length=32)
    one = model.generation(
        "sam has 4 cups", {"until": ["[EOS]", "[UNK]", "[MASK]", "x"], "max_gen_toks": 9}, 0
    )
    assert one.config.stop == ((1,), (2,))
    assert one.gen_length == 32
    with caplog.at_level("WARNING", logger="lm_eval.dparallel"):
        cut = model.generation(" ".join(["sam"] * 300), {}, 0)
        model.generation("sam juggles 4 cups and whistles", {}, 0)
        model.generation("sam whistles", {}, 0)
    assert len(cut.prompt) == 256 - 32
    assert "its first 76 tokens are left out" in caplog.text
    assert caplog.text.count("does not know all words") == 1


def test_the_mask_token_is_the_models_everywhere(make: Any) -> None:
    """That of the argument too, which is then no end, as little as the checkpoint's own mask token."""
    other = make(mask_id=1)
    assert (other.model.mask_id, other.model.eos_ids, other.eot_token_id) == (1, (), None)
    assert other.get_model_info()["mask_id"] == 1
    assert other.generation("sam", {"until": ["[EOS]"]}, 0).config.stop == ()
    usual = make()
    assert (usual.eot_token_id, usual.generation("sam", {}, 0).config.eos_ids) == (1, (1,))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": "entropie:1"}, "policy: expected"),
        ({"cache": "block"}, "cache: expected"),
        ({"cache": ""}, "cache: expected one of .* got ''"),
        ({"batch_size": 0}, "batch_size: expected a whole number >= 1 or 'auto', got 0"),
        ({"likelihood": "exact"}, "method: expected one of"),
        ({"mc_num": 0}, "mc_num: expected a whole number >= 1, got 0"),
        ({"gen_length": "long"}, "gen_length: expected a whole number >= 1, got 'long'"),
        ({"batch_size": "many"}, "batch_size: expected a whole number >= 1 or 'auto', got 'many'"),
        ({"dtype": "int8"}, "dtype: expected auto, float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_bad_model_arguments(make: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(**options)


def test_bad_generation_arguments(make: Any) -> None:
    model = make(batch_size="auto:4")
    assert model.batch_size == 16
    for name, value in (("min_p", 0.9), ("num_beams", 4), ("tempreature", 1)):
        with pytest.raises(ValueError, match=f"gen_kwargs: {name}={value} is not supported"):
            model.generate_until([asked("sam", {name: value, "do_sample": True})])
    for name in ("max_gen_toks", "temperature"):
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got 'much'"):
            model.generate_until([asked("sam", {name: "much"})])
    with pytest.raises(ValueError, match="max_length: 256 positions do not hold 256 tokens"):
        model.generate_until([asked("sam", {"max_gen_toks": 256})])


def test_processes_share_the_documents(harness: Any, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness deals them out by rank and gathers by these calls; here the other process says the same."""
    alone = make()
    assert (alone.rank, alone.world_size, alone.gather_object("a")) == (0, 1, ["a"])
    assert alone.all_gather(torch.tensor(3)).tolist() == [3]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(harness.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(harness.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(harness.dist, "all_gather", lambda parts, own: [part.copy_(own) for part in parts])
    monkeypatch.setattr(harness.dist, "gather_object", lambda own, all_of, dst: all_of and all_of.clear())
    second = make()
    assert (second.rank, second.world_size) == (1, 2)
    assert second.all_gather(torch.tensor(3)).tolist() == [3, 3]
    assert second.gather_object("a") is None
    monkeypatch.setattr(harness.torch.cuda, "is_available", lambda: True)
    assert harness.device_of("cuda:0", None) == "cuda:0"
    assert harness.device_of("cuda:0", "3") == "cuda:3"


def test_harness_runs_its_tasks(harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole harness in process, offline: our tasks in YAML, and its own gsm8k over local problems."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": p.prompt, "answer": p.response} for p in PROBLEMS]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    limit = 4
    own = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    (tmp_path / "local.yaml").write_text(
        f"include: {own}\n"
        "task: gsm8k_local\n"
        "dataset_path: json\n"
        "dataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'problems.jsonl'}}}}}\n"
        "fewshot_split: null\ntraining_split: null\nnum_fewshot: 0\n"
        'doc_to_text: "{{question}}"\n'
    )
    manager = TaskManager(include_path=[str(HERE / "lm_eval_tasks"), str(tmp_path)], include_defaults=False)
    results = lm_eval.simple_evaluate(
        model="dparallel",
        model_args={"pretrained": STUDENT, "mc_num": 4, "greedy": False, "dtype": "float32"},
        tasks=["dparallel_words", "dparallel_choice", "gsm8k_local"],
        task_manager=manager,
        batch_size=16,
        limit=limit,
        bootstrap_iters=0,
        use_cache=str(tmp_path / "responses"),
    )
    found = results["results"]
    assert found["dparallel_words"]["exact_match,after-hashes"] >= 0.75
    assert found["dparallel_choice"]["acc,none"] >= 0.75
    assert found["gsm8k_local"]["exact_match,strict-match"] >= 0.75
    assert results["config"]["tokens_per_pass"] > 2
    samples = results["samples"]["gsm8k_local"]
    said = [one["resps"][0][0] for one in samples if one["filter"] == "strict-match"]
    assert said == responses(limit, threshold=0.5)

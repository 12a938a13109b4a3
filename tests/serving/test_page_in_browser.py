"""The page in a browser: what is shown, while tokens come."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import MODEL, PROMPT
from conftest import ROOT
from dparallel import registry
from dparallel.cli import app
from server_here import Here, serving
from test_page import drafts_of
from typer.testing import CliRunner

from benchmarks.serving import KEY
from dparallel_ext import rules

sys.path.insert(0, str(ROOT / "tools"))
import screenshot

TEACHER, CAUSAL = "builtin:teacher", "builtin:causal"


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    """The student, the teacher, and an autoregressive model with a drafter."""
    with serving(others={TEACHER: {}, CAUSAL: {"drafter": "builtin:dflash", "draft_size": 7}}) as running:
        yield running


@pytest.fixture(scope="module")
def locked() -> Iterator[Here]:
    with serving(keys=(KEY,)) as running:
        yield running


PLAYWRIGHT = importlib.util.find_spec("playwright") is not None


CHROMIUM = any(map(shutil.which, screenshot.BROWSERS))


in_chromium = pytest.mark.skipif(
    not (PLAYWRIGHT and CHROMIUM), reason="no chromium here" if PLAYWRIGHT else "no playwright here"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with screenshot.chromium() as running:
        yield running


class Watched:
    """A tab, and what it had to complain about: nothing may be left of that at the end of a test."""

    def __init__(self, browser: Any, **settings: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **settings})
        self.context.set_default_timeout(10_000)
        self.tab = self.context.new_page()
        self.complaints: list[str] = []
        self.tab.on("console", lambda said: self.complaints.append(f"{said.type}: {said.text}"))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}"))

    def open(self, url: str, panes: int = 1) -> Watched:
        self.tab.goto(url)
        self.tab.locator(".pane").nth(panes - 1).wait_for()
        return self

    def decode(self, prompt: str | None = None) -> str:
        """Press the button, and see every answer to its end; what is said then."""
        if prompt is not None:
            self.tab.get_by_label("Problem", exact=True).fill(prompt)
        self.tab.get_by_label("Pace").select_option("as it comes")
        self.tab.get_by_role("button", name="Decode").click()
        stop = self.tab.get_by_role("button", name="Stop")
        stop.and_(self.tab.locator(":disabled")).wait_for()
        return str(self.tab.get_by_role("status").inner_text())

    def tokens(self, name: str) -> list[str]:
        """Of an answer in front of its end; a mask is ""."""
        found = self.tab.get_by_role("listbox", name=f"Tokens of {name}", exact=True).get_by_role("option")
        return [text for text in found.all_text_contents() if text != "·"]

    def figures(self, at: int) -> dict[str, str]:
        figures = self.tab.locator(".pane").nth(at).locator(".figures")
        names, values = figures.locator("dt"), figures.locator("dd")
        return dict(zip(names.all_text_contents(), values.all_text_contents(), strict=True))

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.context.close()
        if kind is None:
            assert not self.complaints


def held(here: Here, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine that stops after two passes over a request, until the request is cancelled."""
    core = here.service.models[name].engine.core
    step, cancel = core.batch.step, core.cancel
    passes, cancelled = itertools.count(), threading.Event()

    def held_step(lanes: Any) -> Any:
        if next(passes) > 1:
            cancelled.wait(20)
        return step(lanes)

    def noted_cancel(id: int) -> None:
        cancel(id)
        cancelled.set()

    monkeypatch.setattr(core.batch, "step", held_step)
    monkeypatch.setattr(core, "cancel", noted_cancel)
    return here.service.models[name].engine


@in_chromium
def test_an_answer_is_watched(browser: Any, here: Here) -> None:
    """Two models side by side on what was typed; the passes back and forth by keys; each token in words."""
    with Watched(browser).open(here.url, 2) as page:
        tab = page.tab
        said = page.decode(PROMPT)
        for at, name in enumerate((MODEL, TEACHER)):
            _, answer = here.ask({"model": name, "prompt": PROMPT, "max_tokens": 64})
            usage = answer["usage"]
            assert page.tokens(name) == answer["choices"][0]["text"].split()
            figures = page.figures(at)
            assert figures["tokens"] == str(usage["completion_tokens"])
            assert figures["passes"] == str(usage["forward_passes"])
            assert figures["tokens a pass"] == f"{usage['tokens_per_pass']:.1f}"
            assert float(figures["tokens a second"]) > 0
            assert f"{name}: {figures['tokens']} tokens in {figures['passes']} passes." in said
        most = usage["forward_passes"]
        slider = tab.get_by_role("slider", name="pass")
        assert slider.input_value() == slider.get_attribute("max") == str(most)
        whole = page.tokens(TEACHER)
        slider.focus()
        slider.press("Home")
        assert set(page.tokens(TEACHER)) == {""}
        seen = []
        for number in range(1, most + 1):
            slider.press("ArrowRight")
            assert tab.locator("#pass-text").inner_text() == f"pass {number} of {most}"
            now = page.tokens(TEACHER)
            assert all(text in ("", final) for text, final in zip(now, whole, strict=False))
            seen.append(len(list(filter(None, now))))
        assert seen == sorted(seen)
        assert len(set(seen)) > 5  # every pass of its own, though passes take milliseconds
        canvas = tab.get_by_role("listbox", name=f"Tokens of {TEACHER}")
        detail = tab.locator(".pane").nth(1).locator(".detail")
        canvas.get_by_role("option").nth(3).hover()
        pattern = r"{} decided in pass \d+, probability \d+(\.\d)? %"
        assert re.fullmatch(pattern.format(re.escape(whole[3])), detail.inner_text())
        canvas.focus()
        canvas.press("End")
        canvas.press("Home")
        canvas.press("ArrowRight")
        assert re.fullmatch(pattern.format(re.escape(whole[1])), detail.inner_text())
        active = canvas.get_attribute("aria-activedescendant")
        assert tab.locator(f"#{active}").get_attribute("aria-label") == detail.inner_text()


@in_chromium
def test_any_rule_and_any_model(browser: Any, here: Here) -> None:
    """From the menus: rules with their parameters, an autoregressive model with its guesses."""
    with Watched(browser).open(here.url, 2) as page:
        tab = page.tab
        rule, parameter = (
            tab.get_by_label("Rule", exact=True).nth(1),
            tab.get_by_label("Parameter of the rule").nth(1),
        )
        assert rule.get_by_role("option").all_text_contents() == [one["name"] for one in rules.menu()]
        assert (rule.input_value(), parameter.input_value()) == ("entropy", "0.5")
        for chosen, value, policy in (
            ("one", None, "one"),
            ("credit", "+confidence:0.8", "credit+confidence:0.8"),
        ):
            rule.select_option(chosen)
            assert parameter.is_disabled() == (value is None)
            if value is not None:
                parameter.fill(value)
            page.decode(PROMPT)
            _, answer = here.ask({"model": TEACHER, "prompt": PROMPT, "max_tokens": 64, "policy": policy})
            assert page.figures(1)["passes"] == str(answer["usage"]["forward_passes"])
        tab.get_by_label("Model", exact=True).nth(1).select_option(CAUSAL)
        assert not rule.is_visible()
        page.decode(PROMPT)
        _, answer = here.ask({"model": CAUSAL, "prompt": PROMPT, "max_tokens": 64})
        assert page.tokens(CAUSAL) == answer["choices"][0]["text"].split()
        drafts = drafts_of(here, model=CAUSAL)
        accepted, drafted = (sum(draft[name] for draft in drafts) for name in ("accepted", "drafted"))
        assert page.figures(1)["guesses accepted"] == f"{accepted} of {drafted}"
        slider = tab.get_by_role("slider")
        for draft in [draft for draft in drafts[:-1] if draft["refused"]]:
            slider.fill(str(draft["pass"]))
            pane = tab.locator(".pane").nth(1)
            refused = [text.strip() for text in draft["refused"]]
            assert pane.locator(".refused").all_text_contents() == refused
            assert pane.locator(".guessed.fresh").count() == draft["accepted"]
        # One more answer beside them, and one fewer.
        tab.get_by_role("button", name="Compare").click()
        assert tab.locator(".pane").count() == 3
        for _ in range(2):
            tab.get_by_role("button", name="Remove this answer").last.click()
        assert tab.locator(".pane").count() == 1
        assert not tab.get_by_role("button", name="Remove this answer").is_visible()


@in_chromium
def test_a_verifier_goes_from_left_to_right(browser: Any) -> None:
    with (
        serving(
            registry.load(TEACHER),
            registry.directory_of(TEACHER),
            {"verifier": registry.VERIFIER},
            name=TEACHER,
        ) as there,
        Watched(browser).open(there.url, 1) as page,
    ):
        assert not page.tab.get_by_label("Rule", exact=True).is_visible()
        page.tab.get_by_text(f"left to right, as far as {registry.VERIFIER} agrees").wait_for()
        page.decode(PROMPT)
        _, answer = there.ask({"model": TEACHER, "prompt": PROMPT, "max_tokens": 64})
        assert page.tokens(TEACHER) == answer["choices"][0]["text"].split()
        assert page.figures(0)["passes"] == str(answer["usage"]["forward_passes"])
        drafts = drafts_of(there, model=TEACHER)
        accepted, drafted = (sum(draft[name] for draft in drafts) for name in ("accepted", "drafted"))
        assert page.figures(0)["guesses accepted"] == f"{accepted} of {drafted}"


@in_chromium
def test_who_leaves_or_stops_cancels(browser: Any, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    with Watched(browser).open(here.url, 2) as page:
        for leaves in (False, True):
            with monkeypatch.context() as patch:
                engine = held(here, TEACHER, patch)
                before = engine.stats.cancelled
                page.tab.get_by_role("button", name="Decode").click()
                page.tab.get_by_text(re.compile(r"^pass \d+ of")).first.wait_for()
                ends = time.monotonic() + 10
                while engine.stats.active != 1:
                    assert time.monotonic() < ends
                    time.sleep(0.01)
                if leaves:
                    page.tab.goto("about:blank")
                else:
                    page.tab.get_by_role("button", name="Stop").click()
                    page.tab.get_by_text(f"{TEACHER}: stopped.").wait_for()
                    assert page.tab.get_by_role("button", name="Decode").is_enabled()
                here.settles()
                assert engine.stats.cancelled == before + 1
    assert not here.faults()


@in_chromium
def test_errors_are_said_in_words(browser: Any, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the answer that they concern, as text whatever they quote; the other goes on."""
    evil = "<img src=x onerror=alert(1)><script>alert(1)</script>"
    with Watched(browser).open(here.url, 2) as page:
        tab = page.tab
        tab.get_by_label("Parameter of the rule").nth(0).fill(evil)
        page.decode(evil)
        first, second = tab.locator(".pane .error").all()
        assert "policy: expected entropy:TAU, got 'entropy:" in first.inner_text()
        assert evil in first.inner_text()
        assert not second.is_visible()
        assert "passes" in page.figures(1)
        assert tab.locator("img, script:not(head script, #data, [src='page.js'])").count() == 0
        # A refusal of the server's is a message of the browser's, too, and no fault of the page's.
        assert [one for one in page.complaints if "400" not in one] == []
        page.complaints.clear()
        tab.get_by_label("Parameter of the rule").nth(0).fill("0.5")
        engine = here.service.models[MODEL].engine

        def fails(lanes: Any) -> Any:
            raise ValueError("no")

        monkeypatch.setattr(engine.core.batch, "step", fails)
        page.decode(PROMPT)
        assert first.inner_text() == "the model failed on this request"
        monkeypatch.undo()
        tab.route("**/v1/**", lambda route: route.abort())
        assert "The server does not answer." in page.decode(PROMPT)
        assert "The server does not answer." in first.inner_text()
        page.complaints.clear()
        tab.unroute("**/v1/**")
        page.decode(PROMPT)
        assert not first.is_visible()


@in_chromium
def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Any, locked: Here) -> None:
    with Watched(browser) as page:
        tab = page.tab
        tab.goto(locked.url)
        key = tab.get_by_label("API key")
        key.fill("wrong")
        key.press("Enter")
        tab.get_by_text("The server does not take this key.").wait_for()
        assert not tab.get_by_label("Problem", exact=True).is_visible()
        key.fill(KEY)
        key.press("Enter")
        tab.locator(".pane").wait_for()
        assert not key.is_visible()
        assert MODEL in page.decode()
        tab.reload()
        tab.locator(".pane").wait_for()
        kept = "() => [Object.values(sessionStorage), Object.keys(localStorage), document.cookie]"
        assert tab.evaluate(kept) == [[KEY], [], ""]
        assert page.complaints  # the browser names each 401
        assert all("401" in one for one in page.complaints)
        page.complaints.clear()


@in_chromium
def test_it_is_legible_and_fits(browser: Any, here: Here) -> None:
    """Text on every colour of the scale by WCAG's AA; the scale by its lightness alone; no sideways scrolling
    on a phone."""
    pixels = """names => {
        const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        const rgb = colour => {
            context.fillStyle = colour;
            context.fillRect(0, 0, 1, 1);
            return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
        };
        return [...document.querySelectorAll(names)].map(each => {
            const of = (element, name) => getComputedStyle(element)[name];
            let behind = each;
            while (of(behind, "backgroundColor") === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            return [rgb(of(each, "color")), rgb(of(behind, "backgroundColor"))];
        });
    }"""

    def luminance(colour: list[int]) -> float:
        parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    size = {"width": 360, "height": 740}
    with Watched(browser, viewport=size).open(here.url, 2) as page:
        page.decode(PROMPT)
        wide = "() => [document.documentElement.scrollWidth, innerWidth]"
        assert page.tab.evaluate(wide) == [360, 360]
        others = "label, .hint, .quiet, dt, dd, button:enabled, select, textarea, .detail, #about"
        for scheme in ("light", "dark"):
            page.tab.emulate_media(color_scheme=scheme)
            for names in ("#scale .chip", ".canvas .token", others):
                pairs = page.tab.evaluate(pixels, names)
                assert len(pairs) >= 7
                for pair in pairs:
                    low, high = sorted(map(luminance, pair))
                    assert (high + 0.05) / (low + 0.05) >= 4.5, pair
            scale = [luminance(back) for _, back in page.tab.evaluate(pixels, "#scale .chip")]
            assert scale == sorted(scale, reverse=scheme == "light")
            assert min(abs(a - b) for a, b in itertools.pairwise(scale)) > 0.015


@in_chromium
def test_a_recording_opens_without_a_server(browser: Any, here: Here, tmp_path: Path) -> None:
    """It shows what the server's page shows; what is in it is text."""
    file = tmp_path / "decode.html"
    evil = "<script>alert(1)</script>"
    asked = ["decode", PROMPT, evil, "--model", TEACHER, "--cache", "dual", "--block-length", "8"]
    done = CliRunner().invoke(app, [*asked, "--html", str(file)])
    assert done.exit_code == 0, done.output
    with Watched(browser).open(here.url, 2) as live, Watched(browser).open(file.as_uri()) as recorded:
        live.decode(PROMPT)
        assert recorded.tab.locator("#problem-text").inner_text() == PROMPT
        assert live.tokens(TEACHER) == recorded.tokens(TEACHER)
        figures = live.figures(1)
        assert {**recorded.figures(0), "tokens a second": ""} == {**figures, "tokens a second": ""}
        for number in (0, 1, int(figures["passes"]) // 2):
            for page in (live, recorded):
                page.tab.get_by_role("slider").fill(str(number))
            assert live.tokens(TEACHER) == recorded.tokens(TEACHER)
        recorded.tab.get_by_label("which").select_option("2 of 2")
        assert recorded.tab.locator("#problem-text").inner_text() == evil
        assert recorded.tab.locator("script").count() == 2
        assert not recorded.tab.get_by_role("button", name="Decode").is_visible()


@in_chromium
def test_the_picture_of_the_docs_is_made(browser: Any, here: Here, tmp_path: Path) -> None:
    """As tools/screenshot.py makes it; the one in the docs is small, too."""
    screenshot.take(browser, here.url, tmp_path / "new" / "page.png")
    for file in (tmp_path / "new" / "page.png", ROOT / "docs" / "page.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
        assert 50_000 < file.stat().st_size < 200_000

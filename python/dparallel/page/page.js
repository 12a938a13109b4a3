// Where answers come from: a recording, or the server. This follows answers.js in one script, see __init__.py.

const DATA = JSON.parse(document.getElementById("data").textContent);
const MOST_PANES = 4;

// --- a recording ----------------------------------------------------------------------------------------

function replay({ title, problems }) {
  document.title = title;
  at("about").textContent = `A recording of ${title}`;
  at("problems").hidden = false;
  at("choose").hidden = problems.length < 2;
  problems.forEach((problem, i) => at("problem").append(new Option(`${i + 1} of ${problems.length}`, i)));
  const open = () => {
    const { prompt, tracks } = problems[at("problem").value];
    at("problem-text").textContent = prompt;
    view.panes = tracks.map((track) => {
      const pane = new Pane();
      pane.element.querySelector(".controls").remove();
      pane.name = pane.label.textContent = track.model;
      pane.how.textContent = [track.how, track.note].filter(Boolean).join(" · ");
      pane.track = new Track(track);
      return pane;
    });
    at("panes").replaceChildren(...view.panes.map((pane) => pane.element));
    view.shown = 0;
    view.refresh();
    view.show(view.most);
  };
  at("problem").addEventListener("change", open);
  open();
}

// --- a server -------------------------------------------------------------------------------------------

const KEY = "dparallel-api-key";
const server = { models: [], running: null };

// Whether a model decodes from left to right, by passes and not by blocks.
const onward = ({ kind, verifier }) => kind === "autoregressive" || verifier !== null;

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function reason(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status} ${answer.statusText}`.trim();
  }
}

function trouble(message) {
  at("trouble").textContent = message;
  at("trouble").hidden = !message;
}

async function load() {
  trouble("");
  let answer;
  try {
    answer = await fetch("v1/models", { headers: headers() });
  } catch {
    return trouble("The server does not answer. Is it still running?");
  }
  at("key").hidden = answer.status !== 401;
  at("ask").hidden = answer.status === 401;
  if (answer.status === 401) {
    if (sessionStorage.getItem(KEY)) trouble("The server does not take this key.");
    sessionStorage.removeItem(KEY);
    return at("key-text").focus();
  }
  if (!answer.ok) return trouble(await reason(answer));
  server.models = (await answer.json()).data;
  at("tokens").placeholder = server.models[0].max_tokens;
  for (const model of server.models.slice(0, 2)) addPane(model.id);
}

function addPane(name) {
  const pane = new Pane();
  const [model, rule, parameter, remove] = pane.element.querySelector(".controls").children;
  pane.label.remove();
  for (const each of server.models) model.append(new Option(each.id, each.id));
  rule.append(...DATA.rules.map((each) => new Option(each.name, each.name)));
  const adapt = () => {
    pane.model = server.models.find((each) => each.id === model.value);
    pane.name = pane.model.id;
    const { drafter, verifier } = pane.model;
    pane.expected = onward(pane.model) ? 0 : pane.model.max_tokens;
    rule.hidden = parameter.hidden = onward(pane.model);
    if (rule.options[0].value === "") rule.options[0].remove();
    if (!onward(pane.model)) {
      const [, named, rest] = (pane.model.policy ?? "").match(/^([^:+]*):?(.*)$/s);
      const known = DATA.rules.some((each) => each.name === named);
      if (!known) rule.prepend(new Option("the server's", ""));
      rule.value = known ? named : "";
      choose(rest);
    } else if (verifier) {
      pane.how.textContent = `left to right, as far as ${verifier} agrees`;
    } else {
      pane.how.textContent = drafter ? `autoregressive, ${drafter} guesses ahead` : "autoregressive, a token a pass";
    }
    pane.track = null;
    view.refresh();
  };
  const choose = (value = null) => {
    const chosen = DATA.rules.find((each) => each.name === rule.value);
    parameter.disabled = !chosen?.parameters;
    parameter.placeholder = chosen?.parameters ?? "";
    parameter.value = value ?? chosen?.usual ?? "";
    pane.how.textContent = chosen?.does ?? "";
  };
  model.addEventListener("change", adapt);
  rule.addEventListener("change", () => choose());
  parameter.addEventListener("keydown", (event) => event.key === "Enter" && decode());
  remove.addEventListener("click", () => {
    pane.abort?.abort();
    view.panes.splice(view.panes.indexOf(pane), 1);
    pane.element.remove();
    countPanes();
    view.refresh();
  });
  // What `policy` of a request says; undefined: as the server has it.
  pane.policy = () => {
    if (rule.hidden || !rule.value) return undefined;
    const value = parameter.disabled ? "" : parameter.value.trim();
    return rule.value + (value && !value.startsWith("+") ? `:${value}` : value);
  };
  model.value = name;
  adapt();
  view.panes.push(pane);
  at("panes").append(pane.element);
  countPanes();
  view.refresh();
}

function countPanes() {
  at("compare").disabled = view.panes.length >= MOST_PANES;
  for (const pane of view.panes) pane.element.querySelector(".remove").hidden = view.panes.length < 2;
}

// The events of a stream of server-sent events, as JSON.
async function* events(answer) {
  let rest = "";
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask(pane, prompt) {
  const body = {
    model: pane.model.id,
    messages: [{ role: "user", content: prompt }],
    stream: true,
    stream_drafts: true,
    stream_options: { include_usage: true },
    logprobs: !pane.model.verifier, // no single model draws its tokens
    policy: pane.policy(),
    max_tokens: Number(at("tokens").value) || undefined,
    temperature: at("temperature").value === "" ? undefined : Number(at("temperature").value),
  };
  pane.fail("");
  pane.track = null;
  pane.draw(0);
  pane.abort = new AbortController();
  const track = new Track({ kind: onward(pane.model) ? "autoregressive" : "diffusion" });
  const began = performance.now();
  const passed = () => (performance.now() - began) / 1000;
  try {
    const answer = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(body),
      signal: pane.abort.signal,
    });
    if (!answer.ok) throw new Error(await reason(answer));
    pane.track = track;
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) track.kept = event.usage.completion_tokens;
      const draft = event.choices[0]?.draft;
      if (draft) track.add(draft, passed());
      view.refresh(true);
    }
    if (track.kept === null) throw new Error("The answer broke off.");
    track.seconds = track.last;
    return `${pane.model.id}: ${count(track.kept, "token")} in ${count(track.passes, "pass")}.`;
  } catch (error) {
    if (error.name === "AbortError") return `${pane.model.id}: stopped.`;
    const message = error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message;
    pane.fail(message);
    return `${pane.model.id}: ${message}`;
  } finally {
    pane.abort = null;
    view.refresh();
  }
}

async function decode() {
  const prompt = at("prompt").value;
  if (server.running) return;
  view.show(0);
  view.following = true;
  view.play(true);
  at("start").disabled = true;
  at("stop").disabled = false;
  at("status").textContent = "Decoding…";
  server.running = Promise.all(view.panes.map((pane) => ask(pane, prompt)));
  const reports = await server.running;
  server.running = null;
  view.following = false;
  view.tick();
  at("start").disabled = false;
  at("stop").disabled = true;
  at("status").textContent = reports.join(" ");
}

function stop() {
  for (const pane of view.panes) pane.abort?.abort();
}

function live() {
  if (DATA.builtin) at("prompt-hint").hidden = false;
  DATA.samples.forEach((sample, i) => at("samples").append(new Option(sample.length > 60 ? `${sample.slice(0, 57)}…` : sample, i)));
  const take = () => (at("prompt").value = DATA.samples[at("samples").value]);
  at("samples").addEventListener("change", take);
  take();
  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    decode();
  });
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) decode();
  });
  at("stop").addEventListener("click", stop);
  addEventListener("pagehide", stop);
  at("compare").addEventListener("click", () => {
    const next = server.models.find((each) => !view.panes.some((pane) => pane.model === each));
    addPane((next ?? view.panes.at(-1).model).id);
  });
  at("key").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, at("key-text").value);
    at("key-text").value = "";
    load();
  });
  load();
}

if (DATA.recording) replay(DATA.recording);
else live();

// The page at "/": asks the API with the token that was typed, and shows what it answers.
//
// The token lives in one variable here and nowhere else. Every text is set as text, never as markup.
const LIVE_MS = 2000; // between two looks at the live figures
const REPLICA_MS = 30000; // a replica that was not heard of for so long is not counted
const WAIT_MS = 120; // after a key, before suggestions are asked for
const FEW = 16; // clients whose bars have room for names
const SAMPLES = 60; // live figures that are drawn
const LAYERS = {
  client: ["own adapters", "the client's own adapters"],
  neighbours: ["nearest clients", "the mean of its nearest clients' adapters"],
  mean: ["all clients", "the mean of all clients' adapters"],
  popularity: ["counts", "counts alone"],
};

const find = (id) => document.getElementById(id);
let token = null;
let operator = false;
let round = null;
let quality = null;
let picked = []; // the history: {item_id, title} of known items, {title} of free text
const replicas = new Map();
const rates = [];

// ---------------------------------------------------------------- elements

function make(name, attributes = {}, ...inside) {
  return fill(document.createElement(name), attributes, inside);
}

function draw(name, attributes = {}, ...inside) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, inside);
}

function fill(element, attributes, inside) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...inside); // strings become text
  return element;
}

const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

// ---------------------------------------------------------------- the API

class Refused extends Error {
  constructor(status, error, wait) {
    super(error?.message ?? "no reason was given");
    this.status = status;
    this.field = error?.field ?? null;
    this.wait = wait;
  }
}

async function ask(method, path, body, bearer = token) {
  let response;
  try {
    response = await fetch(path, {
      method,
      headers: { Authorization: `Bearer ${bearer}`, "Content-Type": "application/json" },
      body,
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
    });
  } catch {
    throw new Refused(0, null, null);
  }
  const answer = parse(await response.text());
  if (!response.ok) {
    throw new Refused(response.status, answer?.error, response.headers.get("Retry-After"));
  }
  return answer;
}

// Ids go up to 2^63, further than this language's numbers are exact: larger ones stay digits.
function parse(text) {
  try {
    return JSON.parse(text, (key, value, context) =>
      Number.isInteger(value) && !Number.isSafeInteger(value) ? context?.source ?? value : value);
  } catch {
    return null;
  }
}

const query = (path, wanted) => `${path}?${new URLSearchParams(wanted)}`;
const inPath = (name) => encodeURIComponent(name);

function explain(error) {
  if (!(error instanceof Refused)) throw error;
  const where = error.field ? ` (${error.field})` : "";
  const words = {
    0: "The service cannot be reached. Is it still running?",
    401: "This token opens nothing. Check that it was copied whole, or ask for a new one.",
    403: `This token may not do that: ${error.message}${where}.`,
    404: `Not found: ${error.message}${where}.`,
    413: `That is too much at once: ${error.message}.`,
    422: `The service does not accept this: ${error.message}${where}.`,
    429: `Too many requests with this token. Try again in ${error.wait ?? 1} s.`,
    503: `The service cannot answer now: ${error.message}. Try again in a moment.`,
  };
  return words[error.status] ?? `The service answered ${error.status}: ${error.message}${where}.`;
}

// ---------------------------------------------------------------- suggestions below an input

// After the editable combobox of the ARIA Authoring Practices: the focus stays in the input.
class Suggestions {
  constructor(input, fetchThem, onPick) {
    this.input = input;
    this.fetchThem = fetchThem;
    this.onPick = onPick;
    this.options = [];
    this.active = -1;
    this.asked = 0;
    this.opening = null;
    this.list = make("ul", {
      id: `${input.id}-options`, role: "listbox", class: "options", hidden: "",
      "aria-label": input.labels[0].textContent,
    });
    input.after(this.list);
    fill(input, {
      role: "combobox", "aria-autocomplete": "list", "aria-expanded": "false",
      "aria-controls": this.list.id, autocomplete: "off", spellcheck: "false",
    }, []);
    input.addEventListener("input", () => this.later());
    input.addEventListener("click", () => this.open(""));
    input.addEventListener("blur", () => this.close());
    input.addEventListener("keydown", (event) => this.press(event));
    this.list.addEventListener("pointerdown", (event) => {
      event.preventDefault(); // or the input would lose the focus, and the list go
      const option = event.target.closest("li");
      if (option && event.button === 0) this.pick([...this.list.children].indexOf(option));
    });
  }

  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.open(this.input.value.trim()), WAIT_MS);
  }

  async open(prefix) {
    if (this.input.readOnly) return;
    const asked = ++this.asked;
    let options = [];
    try {
      options = await this.fetchThem(prefix);
    } catch (error) {
      tell(explain(error));
    }
    if (asked !== this.asked || document.activeElement !== this.input) return;
    this.options = options;
    this.list.replaceChildren(...options.map((option, at) =>
      make("li", { role: "option", id: `${this.list.id}-${at}`, "aria-selected": "false" },
        make("span", {}, option.label), make("span", { class: "note" }, option.note))));
    this.show(options.length > 0);
    this.mark(-1);
  }

  show(open) {
    this.list.hidden = !open;
    this.input.setAttribute("aria-expanded", String(open));
  }

  close() {
    clearTimeout(this.timer);
    this.asked++;
    this.show(false);
    this.mark(-1);
  }

  mark(active) {
    this.active = active;
    [...this.list.children].forEach((option, at) =>
      option.setAttribute("aria-selected", String(at === active)));
    if (active < 0) {
      this.input.removeAttribute("aria-activedescendant");
    } else {
      const option = this.list.children[active];
      this.input.setAttribute("aria-activedescendant", option.id);
      option.scrollIntoView({ block: "nearest" });
    }
  }

  pick(at) {
    const option = this.options[at];
    this.close();
    this.onPick(option);
  }

  async press(event) {
    const open = !this.list.hidden;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (!open) await (this.opening ??= this.open("").finally(() => { this.opening = null; }));
      const n = this.options.length;
      if (n === 0 || this.list.hidden) return;
      const step = event.key === "ArrowDown" ? 1 : -1;
      this.mark(this.active < 0 ? (step > 0 ? 0 : n - 1) : (this.active + step + n) % n);
    } else if (event.key === "Enter" && open && this.active >= 0) {
      event.preventDefault();
      this.pick(this.active);
    } else if (event.key === "Escape" && open) {
      event.preventDefault();
      this.close();
    }
  }
}

// ---------------------------------------------------------------- token

async function enter(event) {
  event.preventDefault();
  const typed = find("token").value.trim();
  find("door-problem").textContent = "";
  if (!typed) {
    find("door-problem").textContent = "Paste a token first.";
    find("token").focus();
    return;
  }
  if (/[^\x21-\x7e]/.test(typed)) {
    find("door-problem").textContent =
      "This is no token: a token has letters, digits, - and _ only.";
    find("token").focus();
    return;
  }
  try {
    const clients = await ask("GET", query("v1/clients", { limit: 1 }), undefined, typed);
    token = typed;
    operator = clients.operator;
    find("token").value = "";
    await showInside(clients);
  } catch (error) {
    leave(explain(error));
  }
}

function leave(why = "") {
  token = null;
  operator = false;
  round = null;
  quality = null;
  picked = [];
  rates.length = 0;
  replicas.clear();
  for (const id of ["ranking", "ladder", "past-items", "quality-chart", "live-chart", "run",
    "live-figures", "live-problem", "history"]) find(id).replaceChildren();
  for (const id of ["client", "user", "title"]) find(id).value = "";
  for (const id of ["inside", "leave", "run", "past", "ladder", "quality-table"]) {
    find(id).hidden = true;
  }
  find("quality-table").querySelector("div").replaceChildren();
  find("status").textContent = "Choose a client and a user, or write a history.";
  find("door").hidden = false;
  find("door-problem").textContent = why;
  tell("");
  find("token").focus();
}

async function showInside(clients) {
  find("door").hidden = true;
  find("inside").hidden = false;
  find("leave").hidden = false;
  const first = clients.clients[0];
  find("client").value = first?.client ?? "";
  find("client").readOnly = !operator;
  if (first) await suggestFirstUser(first.client);
  await look();
  (operator ? find("client") : find("user")).focus();
}

// ---------------------------------------------------------------- asking

function tell(problem) {
  find("problem").textContent = problem;
}

async function suggestFirstUser(client) {
  const path = `v1/clients/${inPath(client)}/users`;
  const { users } = await ask("GET", query(path, { limit: 1 }));
  find("user").value = users.length ? String(users[0].user_id) : "";
}

async function submit(event) {
  event.preventDefault();
  tell("");
  const byUser = find("by-user").checked;
  if (!byUser && find("title").value.trim()) addTyped();
  const client = find("client").value.trim();
  const k = Number(find("k").value);
  const wrong = byUser && !/^-?\d+$/.test(find("user").value.trim()) ? "user"
    : !client ? "client" : !Number.isInteger(k) || k < 1 || k > 1000 ? "k" : null;
  for (const id of ["client", "user", "k"]) {
    find(id).setAttribute("aria-invalid", String(id === wrong));
  }
  if (wrong) {
    tell({ user: "Choose a user: ids are whole numbers.", client: "Choose a client.",
      k: "From 1 to 1000 items can be asked for." }[wrong]);
    find(wrong).focus();
    return;
  }
  const user = byUser ? String(BigInt(find("user").value.trim())) : null;
  const history = picked.map((entry) => entry.item_id ?? JSON.stringify(entry.title));
  const whose = byUser ? `"user_id": ${user}` : `"history": [${history.join(", ")}]`;
  const plain = JSON.stringify({ client, k, filters: { seen: find("seen").checked } });
  const button = find("ask-form").querySelector("button[type=submit]");
  button.setAttribute("aria-busy", "true");
  const began = performance.now();
  try {
    const answer = await ask("POST", "v1/recommend", `${plain.slice(0, -1)}, ${whose}}`);
    const took = performance.now() - began;
    showAnswer(answer, byUser ? `user ${user} of ${client}` : `this history at ${client}`, took);
    if (byUser) await showPast(client, user);
    else find("past").hidden = true;
    drawQuality();
  } catch (error) {
    if (error.status === 401) leave(explain(error));
    else tell(explain(error));
  } finally {
    button.removeAttribute("aria-busy");
  }
}

function showAnswer(answer, whom, took) {
  const [, layer] = LAYERS[answer.layer];
  find("status").textContent =
    `${count(answer.items.length, "item")} for ${whom}, answered by ${layer} ` +
    `of round ${answer.round} in ${took.toFixed(0)}\u00a0ms.`;
  // on a narrow screen it stands below the form
  if (find("status").getBoundingClientRect().top > innerHeight) {
    find("answer-title").scrollIntoView();
  }
  find("ladder").hidden = false;
  find("ladder").replaceChildren(...Object.entries(LAYERS).map(([name, [short]]) =>
    make("li", { "aria-current": name === answer.layer ? "true" : null }, short)));
  if (!answer.items.length) {
    find("ranking").replaceChildren(make("p", {}, "No item is left to recommend."));
    return;
  }
  const scores = answer.items.map((item) => item.score);
  const high = Math.max(...scores);
  const low = Math.min(0, ...scores);
  const rows = answer.items.map((item) => make("tr", {},
    make("td", {}, String(item.rank)),
    make("th", { scope: "row" }, item.title),
    make("td", { class: "score" }, make("div", {},
      drawLevel(high > low ? (item.score - low) / (high - low) : 1),
      make("span", {}, item.score.toFixed(3))))));
  find("ranking").replaceChildren(make("table", {},
    make("caption", { class: "unseen" }, `Recommendations for ${whom}`),
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "#"),
      make("th", { scope: "col" }, "Title"), make("th", { scope: "col" }, "Score"))),
    make("tbody", {}, ...rows)));
}

function drawLevel(share) {
  return draw("svg", { viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" },
    draw("rect", { class: "track", width: 100, height: 6 }),
    draw("rect", { class: "level", width: (100 * share).toFixed(2), height: 6 }));
}

async function showPast(client, user) {
  const past = await ask("GET", `v1/clients/${inPath(client)}/users/${inPath(user)}`);
  const shown = past.items.length < past.interactions ? `, the newest ${past.items.length}` : "";
  find("past-words").textContent =
    `${count(past.interactions, "item")} met by user ${user}${shown}, newest first.`;
  find("past-items").replaceChildren(...past.items.map((item) => make("li", {}, item.title)));
  find("past").hidden = false;
}

// ---------------------------------------------------------------- a history

function addTyped() {
  addEntry({ title: find("title").value.trim() });
}

function addEntry(entry) {
  titles.close();
  picked.push(entry);
  find("title").value = "";
  showHistory();
}

function showHistory() {
  find("history").replaceChildren(...picked.map((entry, at) => {
    const remove = make("button", { type: "button", "aria-label": `Remove ${entry.title}` }, "×");
    remove.addEventListener("click", () => {
      picked.splice(at, 1);
      showHistory();
      (find("history").querySelectorAll("button")[at] ?? find("title")).focus();
    });
    const free = entry.item_id === undefined;
    return make("li", { class: free ? "free" : null, title: free ? "Not from the catalogue" : null },
      make("span", {}, entry.title), remove);
  }));
}

function switchBy() {
  const byUser = find("by-user").checked;
  find("user-field").hidden = !byUser;
  find("history-field").hidden = byUser;
  tell("");
}

// ---------------------------------------------------------------- quality and live figures

async function look() {
  const { runs: [run] } = await ask("GET", "v1/runs");
  find("run").hidden = false;
  const facts = { Run: run.run, Method: run.method,
    Round: `${run.round}${run.promoted ? " (promoted)" : ""}`,
    Clients: run.clients.toLocaleString("en"), Items: run.items.toLocaleString("en") };
  find("run").replaceChildren(...Object.entries(facts).map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  if (run.round !== round) {
    round = run.round;
    quality = await ask("GET", "v1/quality");
    showQuality();
  }
  find("live-words").hidden = operator;
  if (operator) showLive(await ask("GET", "v1/live"));
  else find("live-words").textContent = "Rate and latency are shown to an operator's token.";
}

async function lookAgain() {
  if (token === null || document.hidden) return;
  try {
    await look();
    find("live-problem").textContent = "";
  } catch (error) {
    if (error.status === 401) leave(explain(error));
    else find("live-problem").textContent = explain(error); // the next look may succeed
  }
}

function showQuality() {
  const values = quality.clients.map((one) => one.ndcg_at_10);
  find("quality-table").hidden = !values.length;
  if (!values.length) {
    find("quality-words").textContent = `Round ${quality.round} was not evaluated.`;
    find("quality-chart").replaceChildren();
    return;
  }
  const mean = average(values);
  const split = quality.split === "test" ? "test" : "validation";
  find("quality-words").textContent = values.length === 1
    ? `NDCG@10 of round ${quality.round}, ${split}.`
    : `NDCG@10 of round ${quality.round}, ${split}: mean ${mean.toFixed(3)}, ` +
      `worst ${Math.min(...values).toFixed(3)}.`;
  drawQuality();
  const rows = quality.clients.map((one) => make("tr", {}, make("th", { scope: "row" }, one.client),
    make("td", {}, one.users.toLocaleString("en")), make("td", {}, one.ndcg_at_10.toFixed(4))));
  find("quality-table").querySelector("div").replaceChildren(make("table", {},
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "Client"),
      make("th", { scope: "col" }, "Users"), make("th", { scope: "col" }, "NDCG@10"))),
    make("tbody", {}, ...rows)));
}

const average = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function drawQuality() {
  const box = find("quality-chart");
  const width = Math.max(box.clientWidth, 120);
  if (!quality?.clients.length || !box.clientWidth) return;
  const bars = [...quality.clients].sort((a, b) => b.ndcg_at_10 - a.ndcg_at_10);
  const most = Math.max(bars[0].ndcg_at_10, 1e-9);
  const mean = average(bars.map((bar) => bar.ndcg_at_10));
  const own = find("client").value.trim();
  const told = bars.slice(0, FEW).map((bar) => `${bar.client} ${bar.ndcg_at_10.toFixed(3)}`);
  const words = `NDCG@10 by client, best first: ${told.join(", ")}` +
    (bars.length > FEW ? `, and ${bars.length - FEW} more` : "");
  const drawThem = bars.length <= FEW ? drawNamed : drawMany;
  const parts = drawThem(bars, most, mean, own, width);
  const height = bars.length <= FEW ? bars.length * 26 + 22 : 140;
  box.replaceChildren(draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": words }, ...parts));
}

// A bar with its name before and its value behind, for each client.
function drawNamed(bars, most, mean, own, width) {
  const short = (name) => name.length > 12 ? `${name.slice(0, 11)}…` : name;
  const left = 10 + 8 * Math.max(...bars.map((bar) => short(bar.client).length));
  const room = Math.max(20, width - left - 52);
  const parts = bars.flatMap((bar, at) => [
    draw("text", { x: left - 8, y: at * 26 + 17, "text-anchor": "end" }, short(bar.client)),
    draw("rect", { class: bar.client === own ? "own" : "bar1", x: left, y: at * 26 + 3, rx: 3,
      height: 20, width: Math.max(1, room * bar.ndcg_at_10 / most) },
    draw("title", {}, bar.client)),
    draw("text", { x: width, y: at * 26 + 17, "text-anchor": "end" }, bar.ndcg_at_10.toFixed(3)),
  ]);
  if (bars.length === 1) return parts;
  const x = left + room * mean / most;
  const bottom = bars.length * 26;
  return [...parts, draw("line", { class: "mean", x1: x, y1: 0, x2: x, y2: bottom + 2 }),
    draw("text", { class: "mean", x, y: bottom + 17, "text-anchor": "middle" },
      `mean ${mean.toFixed(3)}`)];
}

// Where there are too many for names: the best one left, the worst one right.
function drawMany(bars, most, mean, own, width) {
  const step = width / bars.length;
  const parts = bars.map((bar, at) => {
    const high = Math.max(1, 100 * bar.ndcg_at_10 / most);
    const is = bar.client === own;
    return draw("rect", { class: is ? "own" : "bar1", x: at * step, y: 110 - high, height: high,
      width: Math.max(step * .85, is ? 3 : .5) },
    draw("title", {}, `${bar.client}: ${bar.ndcg_at_10.toFixed(3)}`));
  });
  return [...parts, draw("line", { class: "axis", x1: 0, y1: 110.5, x2: width, y2: 110.5 }),
    draw("line", { class: "mean", x1: 0, y1: 110 - 100 * mean / most, x2: width,
      y2: 110 - 100 * mean / most }),
    draw("text", { class: "mean", x: width, y: 104 - 100 * mean / most, "text-anchor": "end" },
      `mean ${mean.toFixed(3)}`),
    draw("text", { class: "dim", x: 0, y: 130 }, "best"),
    draw("text", { class: "dim", x: width, y: 130, "text-anchor": "end" }, "worst client")];
}

function showLive(live) {
  const now = performance.now();
  replicas.set(live.replica, { ...live, now });
  for (const [name, seen] of replicas) if (now - seen.now > REPLICA_MS) replicas.delete(name);
  const all = [...replicas.values()];
  const rate = all.reduce((sum, one) => sum + one.per_second, 0);
  const slowest = (key) => {
    const known = all.map((one) => one[key]).filter((value) => value !== null);
    return known.length ? Math.max(...known) : null;
  };
  rates.push(rate);
  if (rates.length > SAMPLES) rates.shift();
  const show = (ms) => ms === null ? "–" : ms.toFixed(ms < 10 ? 1 : 0);
  const figures = { "per s": rate.toFixed(rate < 10 ? 2 : 0), "p50, ms": show(slowest("p50_ms")),
    "p99, ms": show(slowest("p99_ms")) };
  find("live-words").hidden = false;
  find("live-words").textContent = `Recommendations of the last ${Math.round(live.window_s)} s, ` +
    `${count(all.length, "replica")}.`;
  find("live-figures").replaceChildren(...Object.entries(figures).map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  drawRates();
}

function drawRates() {
  const box = find("live-chart");
  const width = Math.max(box.clientWidth, 120);
  const most = Math.max(...rates, .1);
  const at = (value, place) =>
    `${(width * place / (SAMPLES - 1)).toFixed(1)},${(44 - 40 * value / most).toFixed(1)}`;
  const first = SAMPLES - rates.length;
  const line = rates.map((value, place) => at(value, first + place));
  const start = (width * first / (SAMPLES - 1)).toFixed(1);
  box.replaceChildren(draw("svg", { viewBox: `0 0 ${width} 46`, role: "img",
    "aria-label": `Requests a second over the last two minutes, ${rates.at(-1).toFixed(2)} now` },
  draw("path", { class: "under", d: `M${start},44L${line.join("L")}L${width},44Z` }),
  draw("path", { class: "trace", d: `M${line.join("L")}` }),
  draw("line", { class: "axis", x1: 0, y1: 45, x2: width, y2: 45 })));
}

// ---------------------------------------------------------------- start

new Suggestions(find("client"), async (prefix) => {
  const { clients } = await ask("GET", query("v1/clients", { prefix, limit: 50 }));
  return clients.map((one) => ({ label: one.client, note: count(one.users, "user") }));
}, async (option) => {
  find("client").value = option.label;
  drawQuality();
  try {
    await suggestFirstUser(option.label);
  } catch (error) {
    tell(explain(error));
  }
});
new Suggestions(find("user"), async (prefix) => {
  const client = find("client").value.trim();
  if (!client) return [];
  const path = `v1/clients/${inPath(client)}/users`;
  const { users } = await ask("GET", query(path, { prefix, limit: 50 }));
  return users.map((one) => ({ label: String(one.user_id), note: count(one.interactions, "item") }));
}, (option) => { find("user").value = option.label; });
const titles = new Suggestions(find("title"), async (title) => {
  if (!title) return [];
  const { items } = await ask("GET", query("v1/items", { title, limit: 20 }));
  return items.map((item) => ({ label: item.title, note: "", item }));
}, (option) => addEntry({ item_id: option.item.item_id, title: option.item.title }));
find("title").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.defaultPrevented && find("title").value.trim()) {
    event.preventDefault();
    addTyped();
  }
});
find("token-form").addEventListener("submit", enter);
find("ask-form").addEventListener("submit", submit);
find("leave").addEventListener("click", () => leave());
for (const id of ["by-user", "by-history"]) find(id).addEventListener("change", switchBy);
new ResizeObserver(() => {
  drawQuality();
  if (rates.length) drawRates();
}).observe(find("inside"));
setInterval(lookAgain, LIVE_MS);
find("token").focus();

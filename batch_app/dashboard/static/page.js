// Keeps a page up to date. Whatever comes from outside becomes text, never markup.
"use strict";

const QUIET_MS = 8000; // without a sign of life for so long, the connection counts as lost
const LONGEST_PAUSE_MS = 15000;
const MAX_LOG_CHARS = 200000;

// -- times in the reader's own zone ---------------------------------------------------------------

function writeTime(element) {
  const at = new Date(element.dateTime);
  element.hidden = Number.isNaN(at.getTime());
  if (element.hidden) return;
  const isToday = at.toDateString() === new Date().toDateString();
  const clock = { hour: "2-digit", minute: "2-digit" };
  const day = { month: "short", day: "numeric" };
  element.textContent = at.toLocaleString(undefined, isToday ? clock : { ...day, ...clock });
  element.title = at.toLocaleString();
}

function writeTimes(root) {
  for (const element of root.querySelectorAll("time[datetime]")) writeTime(element);
}

// -- what the events say --------------------------------------------------------------------------

function showBatch(view) {
  for (const root of document.querySelectorAll(`[data-batch="${CSS.escape(view.id)}"]`)) {
    const changed = root.dataset.state !== view.state;
    root.dataset.state = view.state;
    for (const element of root.querySelectorAll("[data-field]")) {
      const text = String(view[element.dataset.field] ?? "");
      if (element.textContent !== text && (text || !element.closest("dl"))) element.textContent = text;
    }
    for (const element of root.querySelectorAll("[data-when]")) {
      element.hidden = !view[element.dataset.when];
    }
    for (const element of root.querySelectorAll("[data-time]")) {
      element.dateTime = view[element.dataset.time] ?? "";
      writeTime(element);
    }
    for (const bar of root.querySelectorAll("progress")) {
      if (view.percent === null) bar.removeAttribute("value");
      else bar.value = view.percent;
    }
    if (changed) refreshSoon();
  }
}

function showMachine(reading) {
  for (const element of document.querySelectorAll("[data-gauge]")) {
    const gauge = reading[element.dataset.gauge];
    if (!gauge) continue;
    element.querySelector("[data-gauge-text]").textContent = gauge.text;
    const meter = element.querySelector("meter");
    if (meter && gauge.share !== null) meter.value = gauge.share;
  }
}

// -- the page anew, where a change is more than a few words ---------------------------------------

let refreshTimer = 0;
let refreshedAt = Date.now();

function refreshSoon() {
  if (!refreshTimer) refreshTimer = setTimeout(refresh, 300);
}

async function refresh() {
  clearTimeout(refreshTimer);
  refreshTimer = 0;
  refreshedAt = Date.now();
  let answer;
  try {
    answer = await fetch(location.href, { headers: { accept: "text/html" }, cache: "no-store" });
  } catch {
    return false;
  }
  if (answer.redirected && new URL(answer.url).pathname === "/sign-in") {
    location.assign(answer.url);
    return false;
  }
  if (!answer.ok) return false;
  const there = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = there.getElementById("live");
  const old = document.getElementById("live");
  if (!fresh || !old) return false;
  const focused = old.contains(document.activeElement) ? document.activeElement.id : "";
  for (const open of old.querySelectorAll("details[open][id]")) {
    fresh.querySelector(`#${CSS.escape(open.id)}`)?.setAttribute("open", "");
  }
  for (const picture of old.querySelectorAll("picture[id]")) keepPicture(picture, fresh);
  writeTimes(fresh);
  old.replaceChildren(...fresh.childNodes);
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  return true;
}

// The same element with new addresses shows its old picture until the new one has come.
function keepPicture(picture, fresh) {
  const twin = fresh.querySelector(`#${CSS.escape(picture.id)}`);
  if (!twin) return;
  const pairs = [...picture.children].map((child, at) => [child, twin.children[at]]);
  twin.replaceWith(picture);
  for (const [child, other] of pairs) {
    for (const name of ["srcset", "src", "alt"]) {
      if (other.hasAttribute(name)) child.setAttribute(name, other.getAttribute(name));
    }
  }
}

// -- the connection -------------------------------------------------------------------------------

const connection = {
  source: null,
  heardAt: 0,
  pauseMs: 1000,
  isLost: false,
  isReady: false,
  timer: 0,

  open() {
    const live = document.getElementById("live");
    if (!live || !live.dataset.events || document.hidden) return;
    this.close();
    this.heardAt = Date.now();
    const source = (this.source = new EventSource(live.dataset.events));
    const on = (name, handle) =>
      source.addEventListener(name, (event) => {
        this.heardAt = Date.now();
        handle(JSON.parse(event.data));
      });
    on("batch", (view) => this.batch(view));
    on("crew", (crew) => {
      const element = document.getElementById("crew");
      if (element && element.textContent !== crew.text && this.isReady) refreshSoon();
    });
    on("machine", showMachine);
    on("trouble", (trouble) => {
      say(trouble.text ? "The database does not answer at the moment. What you see may be old." : "");
    });
    on("ready", () => {
      this.isReady = true;
      this.pauseMs = 1000;
      if (this.isLost) {
        this.isLost = false;
        say("");
        refresh();
      }
    });
    on("beat", () => this.reload());
    on("end", () => this.lose("The server is stopping. This page goes on when it is back."));
    source.onerror = () => this.lose("The server does not answer. Trying again…");
  },

  batch(view) {
    const shown = document.querySelector(`[data-batch="${CSS.escape(view.id)}"]`);
    if (shown) showBatch(view);
    else if (this.isReady && !document.querySelector("#live[data-page=later]")) refreshSoon();
  },

  // Pages with charts, tables of failures or workers are fetched anew now and then.
  reload() {
    const every = Number(document.getElementById("live")?.dataset.reload);
    const article = document.querySelector("article[data-group]");
    if (!every || Date.now() - refreshedAt < every * 1000) return;
    if (document.querySelector("details.confirm[open]")) return; // somebody is about to decide
    if (!article || article.dataset.group === "running") refresh();
  },

  lose(text) {
    this.close();
    this.isLost = true;
    say(text);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.tryAgain(), this.pauseMs);
    this.pauseMs = Math.min(2 * this.pauseMs, LONGEST_PAUSE_MS);
  },

  async tryAgain() {
    if (document.hidden) return;
    if (await refresh()) this.open();
    else this.lose("The server does not answer. Trying again…");
  },

  close() {
    this.source?.close();
    this.source = null;
    this.isReady = false;
  },
};

function say(text) {
  const element = document.querySelector("#connection p");
  element.textContent = text;
  element.hidden = !text;
}

setInterval(() => {
  if (connection.source && Date.now() - connection.heardAt > QUIET_MS) {
    connection.lose("The server does not answer. Trying again…");
  }
}, 1000);

// A browser opens only a few connections to one server: what nobody looks at keeps none.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    connection.close();
    log.stop();
  } else {
    connection.isLost = true;
    connection.open();
    log.start();
  }
});

// -- the log --------------------------------------------------------------------------------------

const log = {
  stopper: null,

  async start() {
    const pre = document.getElementById("log");
    if (!pre || document.hidden) return;
    this.stop();
    const stopper = (this.stopper = new AbortController());
    try {
      const answer = await fetch(`${pre.dataset.url}&follow=true`, { signal: stopper.signal });
      if (!answer.ok) return;
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        text = (text + value).slice(-MAX_LOG_CHARS);
        const follows = document.getElementById("log-follow").checked;
        pre.textContent = text;
        if (follows) pre.scrollTop = pre.scrollHeight;
      }
    } catch (error) {
      if (error.name === "AbortError") return;
    }
    const group = document.querySelector("article[data-group]")?.dataset.group;
    if (group === "pending" || group === "running") setTimeout(() => this.start(), 2000);
  },

  stop() {
    this.stopper?.abort();
    this.stopper = null;
  },
};

writeTimes(document);
connection.open();
log.start();

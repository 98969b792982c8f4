// Submitting a file: chosen or dropped, checked and estimated, then queued.
"use strict";

(() => {
  const form = document.getElementById("submit");
  if (!form) return;
  const byId = (id) => document.getElementById(id);
  const file = byId("file");
  const model = byId("model");
  const queue = byId("queue");
  const check = byId("check");
  const outcome = byId("outcome");
  const formToken = document.querySelector("meta[name=form-token]")?.content;
  let running = null;

  // -- choosing -----------------------------------------------------------------------------------

  file.addEventListener("change", chosen);
  model.addEventListener("change", chosen);
  check.addEventListener("click", estimate);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  const drop = byId("drop");
  for (const name of ["dragenter", "dragover"]) drop.addEventListener(name, () => drop.classList.add("over"));
  for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));

  function chosen() {
    const one = file.files[0];
    byId("chosen").hidden = !one;
    byId("chosen").textContent = one ? `${one.name}, ${bytes(one.size)}` : "";
    outcome.replaceChildren();
    queue.disabled = check.disabled = !one;
    if (!one) return;
    const most = Number(form.dataset.maxBytes);
    if (one.size > most) {
      queue.disabled = check.disabled = true;
      problem(`This file has ${bytes(one.size)}; the server takes up to ${bytes(most)} (max_upload_bytes).`);
      return;
    }
    if (/\.(csv|tsv|parquet|xlsx?)$/i.test(one.name)) {
      queue.disabled = check.disabled = true;
      problem("A table becomes requests in a terminal, where the prompt for each row is named:");
      add(outcome, "pre", `vllm-batch submit ${quoted(one.name)} --model ${quoted(model.value)} --template "Summarise: {text}"`);
      return;
    }
    if (/\.(gz|zst)$/i.test(one.name)) {
      queue.disabled = check.disabled = true;
      problem("Packed files are sent from a terminal, or unpacked before:");
      add(outcome, "pre", `vllm-batch submit ${quoted(one.name)} --model ${quoted(model.value)}`);
      return;
    }
    estimate();
  }

  // For a shell, so that a name can be pasted whatever is in it.
  function quoted(text) {
    return /^[\w./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
  }

  // -- asking -------------------------------------------------------------------------------------

  function send(path, what) {
    running?.abort();
    const body = new FormData();
    body.append("model", model.value);
    body.append("file", file.files[0]);
    const request = (running = new XMLHttpRequest());
    request.open("POST", path);
    request.responseType = "text";
    request.setRequestHeader("accept", "application/json");
    if (formToken) request.setRequestHeader("x-form-token", formToken);
    const bar = byId("upload-bar");
    byId("upload").hidden = false;
    byId("upload-text").textContent = `${what}…`;
    bar.value = 0;
    request.upload.onprogress = (event) => {
      if (!event.lengthComputable) return;
      bar.value = (100 * event.loaded) / event.total;
      if (event.loaded === event.total) {
        bar.removeAttribute("value");
        byId("upload-text").textContent = `${what}: the server checks the lines…`;
      }
    };
    return new Promise((resolve) => {
      const end = (answer) => {
        byId("upload").hidden = true;
        running = null;
        resolve(answer);
      };
      request.onload = () => {
        let parsed = null;
        try {
          parsed = JSON.parse(request.responseText);
        } catch {
          // not ours; the status says enough
        }
        end({ status: request.status, body: parsed });
      };
      request.onerror = () => end({ status: 0, body: null });
      request.onabort = () => resolve(null);
      request.send(body);
    });
  }

  async function estimate() {
    if (!file.files.length) return;
    outcome.replaceChildren();
    queue.disabled = true;
    const answer = await send("/v1/estimate", "Checking");
    if (answer === null) return;
    queue.disabled = check.disabled = false;
    if (answer.status === 404 || answer.status === 405) return; // a server without estimates
    if (answer.status !== 200) {
      refused(answer);
      queue.disabled = true;
      return;
    }
    showEstimate(answer.body);
  }

  async function submit() {
    if (!file.files.length) return;
    queue.disabled = check.disabled = true;
    const answer = await send("/v1/batches", "Uploading");
    if (answer === null) return;
    check.disabled = false;
    if (answer.status === 200 && answer.body?.batch_id) {
      location.assign(`/batches/${encodeURIComponent(answer.body.batch_id)}`);
      return;
    }
    queue.disabled = false;
    outcome.replaceChildren();
    refused(answer);
  }

  // -- showing ------------------------------------------------------------------------------------

  function refused({ status, body }) {
    if (status === 401) {
      location.assign(`/sign-in?next=${encodeURIComponent(location.pathname)}`);
      return;
    }
    if (status === 0) {
      problem("The server does not answer. Try again when it is back.");
      return;
    }
    problem(body?.error?.message ?? `The server refused it (${status}).`);
    if (Array.isArray(body?.errors)) lines(body.errors, body.total ?? body.errors.length);
  }

  function problem(text) {
    const paragraph = add(outcome, "p", text);
    paragraph.className = "problem";
    paragraph.setAttribute("role", "alert");
  }

  function lines(errors, total) {
    const heading = add(outcome, "h2", `${total.toLocaleString("en")} ${total === 1 ? "line" : "lines"} can't run`);
    heading.id = "bad-lines";
    const box = add(outcome, "div");
    box.className = "scroll";
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-labelledby", "bad-lines");
    const table = add(box, "table");
    table.className = "stack";
    const head = add(add(table, "thead"), "tr");
    for (const title of ["Line", "What is wrong", "Field"]) add(head, "th", title).scope = "col";
    const rows = add(table, "tbody");
    for (const error of grouped(errors)) {
      const row = add(rows, "tr");
      const where = error.last > error.line ? `${error.line}–${error.last}` : (error.line ?? "–");
      const line = add(row, "td", where);
      line.className = "number";
      line.dataset.label = error.last > error.line ? "Lines" : "Line";
      add(row, "td", error.message ?? error.code);
      add(row, "td", error.param ?? "").dataset.label = "Field";
    }
    if (total > errors.length) add(outcome, "p", `The first ${errors.length} are shown.`).className = "sub";
  }

  // Neighbours with the same error become one row, from `line` to `last`.
  function grouped(errors) {
    const found = [];
    for (const error of errors) {
      const before = found.at(-1);
      const isNext = before?.line && error.line === before.last + 1;
      if (isNext && before.message === error.message && before.param === error.param) before.last = error.line;
      else found.push({ ...error, last: error.line });
    }
    return found;
  }

  // The answer of POST /v1/estimate: what would become of the file, by model.
  function showEstimate(body) {
    if (body.num_errors) {
      problem("Nothing of this file can be queued until these lines are right.");
      lines(body.errors, body.num_errors);
      queue.disabled = true;
      return;
    }
    const row = body.models.find((one) => one.model === model.value) ?? body.models[0] ?? {};
    const one = row.estimate ?? {};
    const box = add(outcome, "section");
    box.className = "card estimate";
    box.id = "estimate";
    if (typeof one.estimated_seconds === "number") {
      const range = one.high_s > one.low_s ? ` (${duration(one.low_s)} to ${duration(one.high_s)})` : "";
      add(box, "p", `About ${duration(one.estimated_seconds)}${range}`).className = "headline";
    } else {
      add(box, "p", "No estimate: this model has not been measured yet.").className = "headline";
    }
    const list = add(box, "dl");
    list.className = "figures";
    figure(list, "Requests", body.num_requests);
    figure(list, "Prompt tokens", one.prompt_tokens);
    figure(list, "Expected answer tokens", one.expected_output_tokens);
    if (one.queue_wait_s) figure(list, "Waits before it", duration(one.queue_wait_s));
    const done = Date.parse(one.estimated_completion ?? "");
    if (!Number.isNaN(done)) {
      const pair = add(list, "div");
      add(pair, "dt", "Done at");
      const time = add(add(pair, "dd"), "time");
      time.dateTime = one.estimated_completion;
      writeTime(time);
    }
    figure(list, "Rests on", one.based_on_benchmark);
    warn(row.num_too_long, `longer than the model's context of ${row.max_model_len} tokens`, row.lines);
    warn(row.num_refused, "refused by the model's chat template", row.lines);
    if (row.reason) add(box, "p", row.reason).className = "sub";

    function warn(number, why, where) {
      if (!number) return;
      const which = where?.length ? ` Line ${where.slice(0, 10).join(", ")}${where.length > 10 ? ", …" : ""}.` : "";
      const text = `${number.toLocaleString("en")} ${number === 1 ? "request is" : "requests are"} ${why} and will fail; the others run.${which}`;
      add(box, "p", text).className = "problem";
    }
  }

  function figure(list, name, value) {
    if (value === undefined || value === null || value === "") return;
    const pair = add(list, "div");
    add(pair, "dt", name);
    add(pair, "dd", typeof value === "number" ? value.toLocaleString("en") : value);
  }

  function add(parent, tag, text) {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  function duration(seconds) {
    if (seconds < 120) return `${Math.max(1, Math.round(seconds))} s`;
    if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
    const minutes = Math.round(seconds / 60);
    if (seconds < 86400) return minutes % 60 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : `${minutes / 60} h`;
    const hours = Math.round(seconds / 3600);
    return hours % 24 ? `${Math.floor(hours / 24)} d ${hours % 24} h` : `${hours / 24} d`;
  }

  function bytes(number) {
    let value = number;
    for (const unit of ["bytes", "KiB", "MiB", "GiB"]) {
      if (value < 1024) return unit === "bytes" ? `${value} bytes` : `${value.toFixed(1)} ${unit}`;
      value /= 1024;
    }
    return `${value.toFixed(1)} TiB`;
  }
})();

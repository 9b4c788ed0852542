// Draws the page from the JSON beside it. Text goes in as text nodes only; nothing here writes HTML.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const PLAIN = 210; // hue of what belongs to no column
const ALL_EXPERTS = "all-experts", ALL_DOMAINS = "all-domains";

// ---- data ----

function numbers(text) { // base64 of little-endian 16-bit numbers
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Uint16Array.from({ length: bytes.length / 2 }, (_, i) => view.getUint16(2 * i, true));
}

function unpack(site) {
  if (!site) return null;
  const steps = numbers(site.values), chosen = site.chosen && numbers(site.chosen);
  const columns = site.columns.length;
  return {
    ...site,
    value: (t, c) => site.low + site.step * steps[t * columns + c],
    fired: (t) => (chosen ? Array.from(chosen.subarray(t * site.active, (t + 1) * site.active)) : []),
    high: site.low + site.step * 65535,
  };
}

const sites = data.sites.map(unpack);
const experts = sites.filter((site) => site.kind === "experts");
const domains = unpack(data.domains);
const tokens = data.tokens.map(([piece, gap, mark, kind, doc, id]) => ({ piece, gap, mark, kind: data.kinds[kind], doc, id }));
const state = { site: "0", colour: "strongest", token: null };
const spans = [];

const current = () => (state.site === ALL_DOMAINS ? domains : state.site === ALL_EXPERTS ? null : sites[Number(state.site)]);
const hue = (site, column) => Math.round((360 * column) / site.columns.length + 210) % 360;
const isExperts = (site) => site.kind === "experts";
const columnName = (site, column) => (isExperts(site) ? `expert ${site.columns[column]}` : site.columns[column]);
const percent = (x) => `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)} %`;
const amount = (site, x) => (isExperts(site) ? percent(x) : x.toFixed(3));

function ranked(site, t) { // columns best first: the chosen ones in the router's order, then the others by score
  const fired = site.fired(t);
  const rest = site.columns.map((_, c) => c).filter((c) => !fired.includes(c));
  return [...fired, ...rest.sort((a, b) => site.value(t, b) - site.value(t, a))];
}

// Share of a token's experts that another token has too, over all sites; with no other token: expected of a random one.
function overlap(t, other) {
  let sum = 0;
  for (const site of experts) {
    const mine = site.fired(t);
    const theirs = other === null ? null : site.fired(other);
    for (const c of mine) sum += (theirs ? Number(theirs.includes(c)) : site.mean[c]) / mine.length;
  }
  return sum / experts.length;
}

// ---- small helpers for elements ----

function element(name, options = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (key === "hue") made.style.setProperty("--h", value);
    else if (key === "alpha") made.style.setProperty("--a", value.toFixed(3));
    else if (key === "onclick") made.addEventListener("click", value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const cells = (kind, row, options = {}) => element("tr", options, ...row.map((cell) => (
  cell instanceof Node ? cell : element(kind, {}, cell))));
const swatch = (site, column) => element("span", { class: "swatch", hue: hue(site, column) });
const shown = (token) => (token.piece ? JSON.stringify(token.piece) : token.mark);

// ---- the text ----

// A piece as nodes: line ends and tabs, and the spaces of a piece that is nothing else, get a mark that is no text.
function written(piece) {
  const marks = { "\n": "↵", "\t": "→", ...(piece.trim() ? {} : { " ": "·" }) };
  return Array.from(piece.match(/[\n\t ]|[^\n\t ]+/g) || [], (part) => (
    marks[part] ? element("i", { class: part === " " ? "space" : "", "data-mark": marks[part] }, part) : part));
}

function drawText() {
  const blocks = new Map();
  tokens.forEach((token, t) => {
    if (!blocks.has(token.doc)) {
      const heading = element("h2", {}, data.groups.document[token.doc].name);
      const block = { paragraph: element("p"), heading };
      blocks.set(token.doc, block);
      $("text").append(element("article", { class: "document" }, heading, block.paragraph));
    }
    const span = element("span", { class: "token", "data-t": t }, ...written(token.piece));
    if (token.mark) span.dataset.mark = token.mark;
    spans.push(span);
    blocks.get(token.doc).paragraph.append(token.gap, span);
  });
}

function paint() {
  const site = current();
  const column = site && state.colour !== "strongest" ? Number(state.colour) : null;
  const ramp = { hue: PLAIN, low: 0, high: 1, text: "" };
  let strength = null; // of a token, on a ramp; null: every token has the colour of its strongest column
  if (!site) {
    const values = tokens.map((_, t) => overlap(t, state.token));
    const others = values.filter((_, t) => t !== state.token);
    [ramp.low, ramp.high] = [Math.min(...others), Math.max(...others)];
    ramp.text = state.token === null ? "experts shared with an average token" : "experts shared with the selected token";
    strength = (t) => values[t];
  } else if (column !== null) {
    [ramp.hue, ramp.low, ramp.high] = [hue(site, column), Math.min(site.low, isExperts(site) ? site.low : 0), site.high];
    ramp.text = isExperts(site) ? `where ${columnName(site, column)} fired, by score` : `weight of ${columnName(site, column)}`;
    strength = (t) => site.value(t, column);
  }
  spans.forEach((span, t) => {
    const style = span.style;
    let stripe = "none", h = ramp.hue, a = 1;
    if (strength) {
      a = ramp.high > ramp.low ? (strength(t) - ramp.low) / (ramp.high - ramp.low) : 0.5;
      if (column !== null && isExperts(site)) a = site.fired(t).includes(column) ? 0.35 + 0.65 * Math.min(1, a) : 0;
    } else {
      const order = ranked(site, t);
      h = hue(site, order[0]);
      const named = isExperts(site) ? site.fired(t) : order;
      a = isExperts(site) ? 0.9 : Math.min(1, 0.15 + (0.85 * site.value(t, order[0])) / (site.high || 1));
      stripe = stripes(site, t, named);
    }
    style.setProperty("--h", h);
    style.setProperty("--a", Math.min(1, Math.max(0, a)).toFixed(3));
    style.setProperty("--stripe", stripe);
    span.classList.toggle("selected", t === state.token);
  });
  drawLegend(site, strength ? ramp : null);
}

// Below a token: one part for each chosen expert, or each domain with a part as wide as its weight.
function stripes(site, t, named) {
  const sizes = named.map((c) => (isExperts(site) ? 1 : Math.max(0, site.value(t, c))));
  const total = sizes.reduce((a, b) => a + b, 0) || 1;
  let at = 0;
  const parts = named.map((c, i) => {
    const from = at;
    at += (100 * sizes[i]) / total;
    return `hsl(${hue(site, c)} var(--s) var(--bar-l)) ${from.toFixed(1)}% ${at.toFixed(1)}%`;
  });
  return `linear-gradient(90deg, ${parts.join(", ")})`;
}

function drawLegend(site, ramp) {
  const legend = $("legend");
  if (!ramp) {
    const what = isExperts(site) ? "background: first expert; line below: all that fired, best first"
      : "background: strongest domain; line below: weights of all";
    legend.replaceChildren(what);
    return;
  }
  const end = (x) => (site && !isExperts(site) ? x.toFixed(2) : site ? x.toFixed(1) : percent(x));
  legend.replaceChildren(`${ramp.text}: ${end(ramp.low)}`, element("span", { class: "ramp", hue: ramp.hue }), end(ramp.high));
}

// ---- the panels ----

function drawToken() {
  const panel = $("token"), t = state.token, site = current();
  if (t === null) {
    panel.replaceChildren(element("h2", {}, "No token selected"),
      element("p", { class: "soft" }, "Click a token, or go to it with ← and →, to see what it was given."));
    return;
  }
  const token = tokens[t];
  panel.replaceChildren(
    element("h2", { id: "token-name" }, shown(token)),
    element("p", { class: "soft" }, `token ${t + 1} of ${tokens.length}, id ${token.id}, ${token.kind}, ${data.groups.document[token.doc].name}`),
    element("div", { class: "scroll" }, site ? tokenAtSite(site, t) : tokenEverywhere(t)));
}

function tokenAtSite(site, t) {
  const fired = site.fired(t);
  const value = element("th", { class: "number" }, isExperts(site) ? "score" : "weight");
  const head = ["rank", "", isExperts(site) ? "expert" : "domain", value, ""];
  const rows = ranked(site, t).map((c, rank) => cells("td", [
    String(rank + 1), element("td", {}, swatch(site, c)), site.columns[c],
    element("td", { class: "number" }, site.value(t, c).toFixed(isExperts(site) ? 2 : 3)),
    fired.includes(c) ? "fired" : "",
  ], { class: !isExperts(site) || fired.includes(c) ? "fired" : "rest" }));
  return element("table", {}, cells("th", head), ...rows);
}

function tokenEverywhere(t) {
  const rows = experts.map((site) => {
    const chips = site.fired(t).flatMap((c) => [swatch(site, c), ` ${site.columns[c]}  `]);
    return element("tr", {}, element("td", {}, site.name), element("td", {}, ...chips));
  });
  return element("table", {}, cells("th", ["site", "experts that fired, best first"]), ...rows);
}

function drawColumns() {
  const site = current(), panel = $("columns");
  if (!site) {
    panel.replaceChildren(element("h2", {}, "Evenness of the load by site"),
      element("p", { class: "soft" }, "Entropy over that of an even load; click to go there."),
      element("div", { class: "bars" }, ...experts.map((each) => {
        const even = each.entropy_max ? each.entropy / each.entropy_max : 1;
        return bar({ hue: PLAIN, name: each.name, share: even, value: percent(even), onclick: () => go(String(sites.indexOf(each))) });
      })));
    return;
  }
  const top = Math.max(...site.mean, 1e-9), even = isExperts(site) ? site.active / site.columns.length : null;
  const what = isExperts(site) ? "Load: share of tokens an expert fired for" : "Mean weight of each domain";
  const facts = [`entropy ${site.entropy.toFixed(2)} of ${site.entropy_max.toFixed(2)} bits`];
  if (isExperts(site)) facts.unshift(`${site.active} of ${site.columns.length} experts fire, mark: even load ${percent(even)}`);
  if (site.gate) facts.push(`gate ${site.gate}`);
  panel.replaceChildren(element("h2", {}, what), element("p", { class: "soft" }, facts.join("; ")),
    element("div", { class: "bars" }, ...site.columns.map((name, c) => bar({
      hue: hue(site, c), name, share: site.mean[c] / top, value: amount(site, site.mean[c]),
      even: even === null || even > top ? null : even / top, pressed: state.colour === String(c), column: c,
      onclick: () => { state.colour = state.colour === String(c) ? "strongest" : String(c); draw(); },
    }))));
}

function bar({ hue: h, name, share, value, even = null, pressed = false, column = "", onclick }) {
  const track = element("span", { class: "track" }, element("span", { class: "fill" }));
  track.firstChild.style.width = `${(100 * share).toFixed(1)}%`;
  if (even !== null) {
    track.append(element("span", { class: "even" }));
    track.lastChild.style.left = `${(100 * even).toFixed(1)}%`;
  }
  return element("button", { type: "button", class: "bar", hue: h, "aria-pressed": pressed, "data-column": column, onclick },
    element("span", { class: "swatch" }), element("span", { class: "name", title: name }, name), track, element("span", { class: "value" }, value));
}

function drawAverages() {
  const site = current(), panel = $("averages");
  panel.hidden = !site;
  if (!site) return;
  const titles = { text: "By text", document: "By document", kind: "By kind of token" };
  const high = Math.max(...Object.values(site.by).flat(2).filter((x) => x !== null), 1e-9);
  const tables = Object.entries(titles).filter(([by]) => data.groups[by].length > (by === "kind" ? 0 : 1)).map(([by, title]) => {
    const head = cells("th", [title, "tokens", ...site.columns.map((name) => element("th", { class: "cell", title: name }, name))]);
    const rows = data.groups[by].map((group, g) => element("tr", {},
      element("th", { title: group.name }, group.name), element("td", { class: "number" }, String(group.tokens)),
      ...site.columns.map((_, c) => {
        const x = site.by[by][g] ? site.by[by][g][c] : null;
        const text = x === null ? "" : isExperts(site) ? (100 * x).toFixed(0) : x.toFixed(2);
        return element("td", { class: "cell", hue: hue(site, c), alpha: x === null ? 0 : x / high, title: columnName(site, c) }, text);
      })));
    return element("div", { class: "scroll group" }, element("table", { class: "heat" }, head, ...rows));
  });
  panel.replaceChildren(element("h2", {}, isExperts(site) ? "Loads in %" : "Mean weights"), ...tables);
}

function draw() {
  const site = current();
  $("tip").hidden = true;
  $("site").value = state.site;
  $("colour").replaceChildren(...(site
    ? [element("option", { value: "strongest" }, isExperts(site) ? "by first expert" : "by strongest domain"),
      ...site.columns.map((_, c) => element("option", { value: c }, columnName(site, c)))]
    : [element("option", { value: "strongest" }, "by overlap")]));
  $("colour").value = state.colour;
  paint();
  drawToken();
  drawColumns();
  drawAverages();
}

// ---- what the reader does ----

function go(site) {
  state.site = site;
  state.colour = "strongest";
  draw();
}

function select(t) {
  state.token = t === state.token ? null : t;
  if (current()) spans.forEach((span, at) => span.classList.toggle("selected", at === state.token));
  else paint(); // overlap is with the selected token
  drawToken();
}

function step(by) {
  const options = Array.from($("site").options, (option) => option.value);
  go(options[(options.indexOf(state.site) + by + options.length) % options.length]);
}

function tip(span) {
  const t = Number(span.dataset.t), site = current(), box = $("tip");
  let said = `${percent(overlap(t, state.token))} of its experts shared`;
  if (site && isExperts(site)) said = `experts ${site.fired(t).map((c) => `${site.columns[c]} (${site.value(t, c).toFixed(2)})`).join(", ")}`;
  else if (site) said = ranked(site, t).map((c) => `${site.columns[c]} ${site.value(t, c).toFixed(3)}`).join(", ");
  box.textContent = `${shown(tokens[t])}  ${said}`;
  box.hidden = false;
  const at = span.getClientRects()[0] || span.getBoundingClientRect(), size = box.getBoundingClientRect();
  box.style.left = `${Math.max(4, Math.min(at.left, innerWidth - size.width - 8))}px`;
  box.style.top = `${at.bottom + size.height + 8 > innerHeight ? at.top - size.height - 6 : at.bottom + 6}px`;
}

function start() {
  const option = (value, text) => element("option", { value }, text);
  const group = (label, ...options) => element("optgroup", { label }, ...options);
  const each = (kind) => sites.flatMap((site, i) => (site.kind === kind ? [option(String(i), site.name)] : []));
  if (domains) $("site").append(group("Domains", option(ALL_DOMAINS, "all sites, mean weights"), ...each("domains")));
  else if (each("domains").length) $("site").append(group("Domains", ...each("domains")));
  if (experts.length) $("site").append(group("Experts", option(ALL_EXPERTS, "all sites, overlap"), ...each("experts")));
  state.site = domains ? ALL_DOMAINS : "0";
  const cut = data.whole ? "" : " (the text goes on)";
  const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
  $("facts").textContent = `${count(tokens.length, "token")}${cut}, ${count(data.groups.document.length, "document")}, ${count(sites.length, "site")}`;
  $("site").addEventListener("change", (event) => go(event.target.value));
  $("colour").addEventListener("change", (event) => { state.colour = event.target.value; draw(); });
  $("before").addEventListener("click", () => step(-1));
  $("after").addEventListener("click", () => step(1));
  const over = (event) => event.target.closest && event.target.closest(".token");
  $("text").addEventListener("click", (event) => { if (over(event)) select(Number(over(event).dataset.t)); });
  $("text").addEventListener("mouseover", (event) => { if (over(event)) tip(over(event)); });
  $("text").addEventListener("mouseout", () => { $("tip").hidden = true; });
  document.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.target.tagName === "SELECT") return;
    const t = state.token === null ? 0 : state.token + by;
    if (t < 0 || t >= tokens.length) return;
    event.preventDefault();
    select(t);
    spans[t].scrollIntoView({ block: "nearest" });
  });
  drawText();
  draw();
}

start();

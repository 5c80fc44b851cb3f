"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const {cells, metrics, groups, fronts} = data;
cells.forEach((cell, number) => { cell.number = number; });
const plot = document.getElementById("plot"), pinned = new Set();
const choose = Object.fromEntries(["x", "y", "group"].map(id => [id, document.getElementById(id)]));
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// Plotly reads a little HTML in its texts; names are to be shown as they are.
const plain = text => String(text).replace(/[&<>]/g, sign => ({"&": "&amp;", "<": "&lt;", ">": "&gt;"})[sign]);
const value = (cell, name) => cell.figures[name][0];

function option(select, value, text) {
  select.append(Object.assign(document.createElement("option"), {value, textContent: text}));
}
for (const [name, metric] of Object.entries(metrics)) for (const axis of ["x", "y"]) option(choose[axis], name, metric.label);
groups.forEach((group, number) => option(choose.group, number, group.title));
document.getElementById("which").hidden = groups.length < 2;
[choose.x.value, choose.y.value] = data.axes;

function facts(cell) {
  return [...cell.broken, ...Object.entries(cell.words).map(([name, text]) => `${metrics[name].label}: ${text}`)];
}

// Error bars end at the group's reach at the latest, see bar_reach in scene.py; arrow heads show which go on.
function bars(chosen, name, [low, high], color) {
  const lengths = chosen.map(cell => cell.figures[name]).map(([at, from = at, to = at]) => [at - Math.max(from, low), Math.min(to, high) - at]);
  const [arrayminus, array] = [0, 1].map(side => lengths.map(both => Math.max(0, both[side])));
  return {type: "data", symmetric: false, array, arrayminus, thickness: 1, width: 0, color};
}

function arrows(here, x, y, name, [low, high]) {
  const symbols = name === x ? ["triangle-left", "triangle-right"] : ["triangle-down", "triangle-up"];
  if (name === y && metrics[y].better === "lower") symbols.reverse();
  return [low, high].map((reach, side) => {
    const cut = here.filter(cell => !cell.baseline && (side ? cell.figures[name][2] > reach : cell.figures[name][1] < reach));
    const at = axis => cut.map(cell => axis === name ? reach : value(cell, axis));
    return {x: at(x), y: at(y), type: "scatter", mode: "markers", showlegend: false, hoverinfo: "skip", marker: {symbol: symbols[side], size: 8, color: cut.map(cell => cell.color)}};
  });
}

function draw() {
  const [x, y] = [choose.x.value, choose.y.value], [across, up] = [metrics[x], metrics[y]];
  if (!across) { plot.textContent = "Nothing was measured that could be drawn."; return; }
  const group = Number(choose.group.value), {reach} = groups[group], by_x = (a, b) => value(a, x) - value(b, x);
  const there = cells.filter(cell => cell.group === group && x in cell.figures && y in cell.figures), here = [...there].sort(by_x);
  const line = (chosen, more) => ({x: chosen.map(cell => value(cell, x)), y: chosen.map(cell => value(cell, y)), type: "scatter", ...more});
  const front = (fronts[`${x}|${y}`] ?? fronts[`${y}|${x}`] ?? []).map(numbers => numbers.map(number => cells[number]).filter(cell => cell.group === group).sort(by_x)).filter(members => members.length);
  const traces = front.map((members, place) => line(members, {mode: "lines", name: "Pareto front", legendgroup: "front", showlegend: place === 0, hoverinfo: "skip", opacity: 0.2, line: {color: css("--ink"), width: 12}}));
  for (const series of new Set(there.map(cell => cell.series))) {
    const chosen = here.filter(cell => cell.series === series), {symbol, size, baseline, dash} = chosen[0];
    const color = baseline ? css("--ink") : chosen[0].color, barred = baseline ? [] : chosen;
    traces.push(line(chosen, {
      mode: "lines+markers", name: plain(series), customdata: chosen.map(cell => cell.number),
      line: {color, width: 1.5, dash},
      marker: {symbol: chosen.map(cell => cell.broken.length ? "x-thin" : symbol), size, color, line: {width: chosen.map(cell => cell.broken.length ? 3 : 1), color: css("--ink")}},
      text: chosen.map(cell => `<b>${plain(cell.name)}</b><br>` + facts(cell).map(plain).join("<br>")), hovertemplate: "%{text}<extra></extra>",
      error_x: bars(barred, x, reach[x], color), error_y: bars(barred, y, reach[y], color),
    }));
  }
  traces.push(...arrows(here, x, y, x, reach[x]), ...arrows(here, x, y, y, reach[y]));
  const held = here.filter(cell => pinned.has(cell.number));
  traces.push(line(held, {mode: "markers", showlegend: false, hoverinfo: "skip", marker: {symbol: "circle-open", size: 20, color: "#e69f00", line: {width: 3}}}));
  draw_tokens(held.length ? held : front.flat());
  const base = here.find(cell => cell.baseline), dotted = {type: "line", line: {color: css("--muted"), width: 1, dash: "dash"}, layer: "below"};
  const axis = metric => ({title: {text: metric.label + (metric.better === "lower" ? " (lower is better)" : "")}, gridcolor: css("--line"), linecolor: css("--line"), zeroline: false});
  Plotly.react(plot, traces, {
    paper_bgcolor: css("--paper"), plot_bgcolor: css("--paper"), font: {color: css("--ink"), family: getComputedStyle(document.body).fontFamily},
    legend: plot.clientWidth < 640 ? {orientation: "h", y: -0.2} : {},
    margin: plot.clientWidth < 640 ? {t: 20, r: 5, l: 50} : {t: 20, r: 20}, hovermode: "closest", hoverlabel: {align: "left", bgcolor: css("--soft"), font: {color: css("--ink")}}, xaxis: axis(across),
    yaxis: {...axis(up), autorange: up.better === "lower" ? "reversed" : true},
    shapes: base ? [{...dotted, xref: "paper", x0: 0, x1: 1, y0: value(base, y), y1: value(base, y)}, {...dotted, yref: "paper", y0: 0, y1: 1, x0: value(base, x), x1: value(base, x)}] : [],
  }, {responsive: true, displaylogo: false});
}

// Of what is pinned, or else of the front: how many tokens each block leaves.
function draw_tokens(chosen) {
  const axis = text => ({title: {text}, gridcolor: css("--line"), linecolor: css("--line"), zeroline: false, rangemode: "tozero"});
  const traces = chosen.filter(cell => cell.tokens.length).map(cell => ({
    x: cell.tokens.map((_, block) => block), y: cell.tokens, type: "scatter", mode: "lines+markers", name: plain(cell.name),
    line: {color: cell.baseline ? css("--ink") : cell.color, width: 1.5, dash: cell.dash}, marker: {symbol: cell.symbol, size: cell.size},
  }));
  Plotly.react("tokens", traces, {
    paper_bgcolor: css("--paper"), plot_bgcolor: css("--paper"), font: {color: css("--ink"), family: getComputedStyle(document.body).fontFamily},
    showlegend: true, margin: {t: 20, r: 20}, xaxis: {...axis("Block"), dtick: 1}, yaxis: axis("Tokens after it, prefix included"),
  }, {responsive: true, displaylogo: false});
}

function pin(number) {
  pinned.has(number) ? pinned.delete(number) : pinned.add(number);
  document.getElementById("pins").replaceChildren(...[...pinned].map(card));
  for (const row of document.querySelectorAll("#cells tbody tr")) row.classList.toggle("pinned", pinned.has(Number(row.dataset.cell)));
  draw();
}

function card(number) {
  const cell = cells[number], box = document.createElement("div"), list = document.createElement("ul");
  box.className = "pin";
  box.style.borderLeftColor = cell.color;
  const close = Object.assign(document.createElement("button"), {textContent: "×", title: "Unpin", onclick: () => pin(number)});
  list.append(...facts(cell).map(text => Object.assign(document.createElement("li"), {textContent: text})));
  box.append(close, Object.assign(document.createElement("b"), {textContent: cell.name}), list);
  if (groups.length > 1) list.before(Object.assign(document.createElement("div"), {textContent: groups[cell.group].title}));
  return box;
}

const body = document.querySelector("#cells tbody"), heads = [...document.querySelectorAll("#cells th")];
function sort(column) {
  const head = heads[column], now = head.getAttribute("aria-sort");
  const up = (now ? {ascending: "descending", descending: "ascending"}[now] : head.dataset.first) === "ascending";
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === "");  // what is missing goes last, either way
    return (up ? 1 : -1) * (isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", {numeric: true}) : a - b);
  };
  body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b))));
}
heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => sort(column)));
const filter = document.getElementById("filter");
function sift() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean), rows = [...body.rows];
  const names = row => [...row.querySelectorAll("td.left")].map(cell => cell.textContent.toLowerCase()).join(" ");
  for (const row of rows) row.hidden = !words.every(word => names(row).includes(word));
  document.getElementById("shown").textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length}`;
}
filter.addEventListener("input", sift);
body.addEventListener("click", event => pin(Number(event.target.closest("tr").dataset.cell)));
for (const select of Object.values(choose)) select.addEventListener("change", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
sift();
plot.on?.("plotly_click", event => { const number = event.points[0].customdata; if (number !== undefined) pin(number); });

"use strict";
// Everything that comes from the store is set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const box = document.getElementById("search");
const only = document.getElementById("only-failed");
const told = document.getElementById("told");
const body = document.getElementById("results");
const MOST = 100;

function cell(row, text, kind) {
  const made = document.createElement("td");
  made.className = kind;
  made.textContent = text;
  row.append(made);
  return made;
}

function status(row, code) {
  const badge = document.createElement("span");
  badge.className = "badge " + (code === 0 ? "ok" : code === 1 ? "wait" : "bad");
  badge.textContent = data.statuses[code];
  cell(row, "", "").append(badge);
}

function show() {
  const wanted = box.value.trim().toLowerCase();
  body.replaceChildren();
  let found = 0;
  for (const [number, key, codes] of data.keys) {
    if (wanted && !key.toLowerCase().includes(wanted)) continue;
    if (only.checked && !codes.some((code) => code > 1)) continue;
    found += 1;
    if (found > MOST || (!wanted && !only.checked && found > 10)) continue;
    const row = document.createElement("tr");
    cell(row, String(number), "number");
    cell(row, key, "key");
    for (const code of codes) status(row, code);
    body.append(row);
  }
  const shown = body.children.length;
  told.textContent = found === shown ? `${found} keys` : `${found} keys, the first ${shown} shown`;
}

box.addEventListener("input", show);
only.addEventListener("change", show);
show();

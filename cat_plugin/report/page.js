"use strict";
(function () {
  const root = document.documentElement;

  // Light or dark: the reader's preference, until the button is pressed.
  const key = "cat-ptq-theme";
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const stored = function () {
    try { return localStorage.getItem(key); } catch (error) { return null; }
  };
  const shown = function () {
    return root.dataset.theme || (dark.matches ? "dark" : "light");
  };
  const button = document.getElementById("theme");
  const label = function () {
    button.textContent = shown() === "dark" ? "Light" : "Dark";
  };
  if (stored() === "light" || stored() === "dark") { root.dataset.theme = stored(); }
  button.addEventListener("click", function () {
    root.dataset.theme = shown() === "dark" ? "light" : "dark";
    try { localStorage.setItem(key, root.dataset.theme); } catch (error) { /* private windows */ }
    label();
  });
  dark.addEventListener("change", label);
  label();

  // Tables: a click on a heading sorts by that column, a second one turns the order round.
  const order = new Intl.Collator(undefined, { numeric: true });
  const valueOf = function (row, column) {
    const text = row.cells[column].dataset.value;
    const number = Number(text);
    return text !== "" && !Number.isNaN(number) ? number : text;
  };
  const compare = function (a, b) {
    if (a === "" || b === "") { return a === b ? 0 : a === "" ? Infinity : -Infinity; }
    if (typeof a === "number" && typeof b === "number") { return a - b; }
    return order.compare(String(a), String(b));
  };
  document.querySelectorAll("table.sortable").forEach(function (table) {
    const headings = Array.from(table.tHead.rows[0].cells);
    headings.forEach(function (heading, column) {
      heading.querySelector("button").addEventListener("click", function () {
        // Numbers start with the greatest, words with the first; what has no value stays at the end.
        const first = heading.classList.contains("number") ? "descending" : "ascending";
        const other = first === "ascending" ? "descending" : "ascending";
        const chosen = heading.getAttribute("aria-sort") === first ? other : first;
        const sign = chosen === "ascending" ? 1 : -1;
        const body = table.tBodies[0];
        const rows = Array.from(body.rows).sort(function (a, b) {
          const difference = compare(valueOf(a, column), valueOf(b, column));
          return Number.isFinite(difference) ? sign * difference : difference > 0 ? 1 : -1;
        });
        rows.forEach(function (row) { body.appendChild(row); });
        headings.forEach(function (each) { each.removeAttribute("aria-sort"); });
        heading.setAttribute("aria-sort", chosen);
      });
    });
    table.dataset.sortable = "ready";
  });
})();

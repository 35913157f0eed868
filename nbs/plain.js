// The plain build's few lines of script: sort a table by a click on a heading, find a heading by a word.
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("th").forEach((th, n) => th.addEventListener("click", () => {
    const down = th.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    th.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => { const text = row.cells[n].textContent.trim(); return text === "" || isNaN(text) ? text : Number(text); };
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const x = key(a), y = key(b);
      return (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y))) * (down ? -1 : 1);
    });
    table.tBodies[0].append(...rows);
  }));
}
const find = document.getElementById("find"), found = document.getElementById("found");
if (find) find.addEventListener("input", () => {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  document.getElementById("menu").checked = words.length > 0;
  found.replaceChildren();
  if (!words.length) return;
  const hits = searchIndex.filter(e => words.every(w => (e.t + " " + e.h + " " + e.x).toLowerCase().includes(w))).slice(0, 20);
  for (const e of hits) {
    const a = document.createElement("a");
    a.href = up + e.p;
    a.textContent = e.h ? e.t + " › " + e.h : e.t;
    found.append(a);
  }
  if (!hits.length) found.textContent = "Nothing found in titles and headings.";
});

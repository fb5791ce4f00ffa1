// Lists that can be searched, filtered and sorted; nothing is hidden from those who run no script.
"use strict";
document.documentElement.classList.add("scripted");

for (const list of document.querySelectorAll("[data-list]")) {
  const holder = list.querySelector("[data-items]");
  const all = Array.from(holder.children);
  const most = Number(list.dataset.most) || Infinity;
  const search = list.querySelector("[data-search]");
  const filters = Array.from(list.querySelectorAll("[data-filter]"));
  const count = list.querySelector("[data-count]");
  const words = new Map(all.map((item) => [item, item.textContent.toLowerCase()]));
  let shown = most;

  const more = document.createElement("button");
  more.type = "button";
  more.className = "more";
  more.addEventListener("click", () => { shown += most; show(); });
  if (all.length > most) list.append(more);

  function show() {
    const wanted = (search ? search.value : "").toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const item of holder.children) {
      const fits = wanted.every((word) => words.get(item).includes(word)) &&
        filters.every((filter) => !filter.value || item.dataset[filter.dataset.filter] === filter.value);
      found += fits;
      item.hidden = !fits || found > shown;
    }
    const visible = Math.min(found, shown);
    if (count) {
      const of = found === all.length ? "" : ` that match, of ${all.length.toLocaleString("en")}`;
      count.textContent = `${found.toLocaleString("en")} ${count.dataset.what}${of}`;
    }
    more.hidden = visible === found;
    more.textContent = `Show more (${visible.toLocaleString("en")} of ${found.toLocaleString("en")} are shown)`;
  }

  function sort(key, descending) {
    const keys = new Map(all.map((item) => [item, key(item)]));
    const numeric = Array.from(keys.values()).every((value) => value === "" || !Number.isNaN(Number(value)));
    const collator = new Intl.Collator("en", { numeric: true });
    const compare = numeric ? (a, b) => Number(a) - Number(b) : collator.compare;
    const sorted = all.slice().sort((a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what is not known comes last, either way
      return descending ? compare(y, x) : compare(x, y);
    });
    holder.append(...sorted);
    show();
  }

  const value = (cell) => cell.dataset.sort ?? cell.textContent.trim().replace(/,(?=\d{3})/g, "");
  list.querySelectorAll("table.sortable thead th").forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      // Numbers are first sorted from the largest.
      const before = heading.getAttribute("aria-sort");
      const descending = before ? before === "ascending" : heading.classList.contains("number");
      list.querySelectorAll("[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sort((item) => value(item.children[column]), descending);
    });
  });
  const order = list.querySelector("[data-order]");
  if (order) {
    order.addEventListener("change", () => {
      const [field, direction] = order.value.split(" ");
      sort((item) => item.dataset[field], direction === "descending");
    });
  }
  const again = () => { shown = most; show(); };
  if (search) search.addEventListener("input", again);
  for (const filter of filters) filter.addEventListener("change", again);
  show();
}

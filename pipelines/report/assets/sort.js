"use strict";
// Tables of class "sortable": a click on a heading sorts by its column, another one turns the order around.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "descending" ||
        (head.getAttribute("aria-sort") === null && !head.classList.contains("num"));
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const rows = Array.from(body.rows);
      rows.sort((one, other) => {
        const left = value(one), right = value(other);
        if (left === "" || right === "") return (left === "") - (right === "");
        const order = head.classList.contains("num") ? left - right : left.localeCompare(right);
        return down ? order : -order;
      });
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "ascending" : "descending");
      body.append(...rows);
    });
  });
}

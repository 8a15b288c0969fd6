// Ask every two seconds whether there is something new; then take over what the new page shows and keep what is open.
const open = () => [...document.querySelectorAll("details")].map(one => one.open);
let known = null, failures = 0;
async function look() {
  try {
    const said = await (await fetch("stamp", {cache: "no-store"})).json();
    const now = document.getElementById("now");
    if (now && now.textContent !== said.now) now.textContent = said.now;
    if (known !== null && known !== said.stamp) {
      const text = await (await fetch("", {cache: "no-store"})).text();
      const page = new DOMParser().parseFromString(text, "text/html"), before = open();
      for (const part of ["header", "main"]) document.querySelector(part).innerHTML = page.querySelector(part).innerHTML;
      document.querySelectorAll("details").forEach((one, place) => { one.open = before[place] || false; });
      document.title = page.title;
      document.body.dataset.updates = Number(document.body.dataset.updates || 0) + 1;
    }
    known = said.stamp;
    failures = 0;
    document.body.classList.remove("gone");
  } catch (error) {
    if (++failures > 2) document.body.classList.add("gone");
  }
  setTimeout(look, 2000);
}
look();

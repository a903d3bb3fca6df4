// A served page asks whether something is new, and takes the new page only then.
(() => {
  const ask = "state" + location.search;
  let wait = 2000;
  const renew = async () => {
    const answer = await fetch(location.href);
    if (!answer.ok) throw new Error(answer.statusText); // keep what is shown, and ask again
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    const open = [...document.querySelectorAll("details")].map((each) => each.open);
    const chosen = new Set([...document.querySelectorAll("input:checked")].map((each) => each.value));
    document.querySelector("main").replaceWith(fresh.querySelector("main"));
    [...document.querySelectorAll("details")].forEach((each, at) => {
      if (at in open) each.open = open[at];
    });
    for (const each of document.querySelectorAll("input")) each.checked = chosen.has(each.value);
    drawValues();
  };
  // Of runs in a store: how old what is shown is.
  const tell = (seen) => {
    if (!seen) return;
    const head = document.querySelector("header");
    const told = document.querySelector("#seen") ?? head.appendChild(document.createElement("p"));
    told.id = "seen";
    told.textContent = seen;
  };
  const look = async () => {
    if (document.hidden) return setTimeout(look, wait); // nobody reads what a request would bring
    try {
      const { version, seen } = await (await fetch(ask)).json();
      // The page has its own version, so that nothing is missed between its load and this question.
      if (version !== document.querySelector("main").dataset.version) await renew();
      tell(seen);
      wait = 2000;
    } catch {
      wait = Math.min(30000, 2 * wait); // the server has ended, or is slow
    }
    setTimeout(look, wait);
  };
  look();
})();

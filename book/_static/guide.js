// On paper, solutions and hints are open and a dark page is light. Afterwards everything is as it was.
(() => {
  const root = document.documentElement;
  let closed = [];
  let theme;
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open], .tag_hide-input details)")];
    closed.forEach(details => { details.open = true; });
    theme = root.dataset.theme;
    root.dataset.theme = "light";
  });
  addEventListener("afterprint", () => {
    closed.forEach(details => { details.open = false; });
    root.dataset.theme = theme;
  });
})();

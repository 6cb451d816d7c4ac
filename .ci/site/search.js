// The lines shown with a search result: of the article alone (not of the buttons above it), and of an object its own entry.
if (typeof Search !== "undefined")
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    for (const e of page.querySelectorAll(".headerlink, .viewcode-link, .exported, script, style, .prev-next-footer, details.hide")) e.remove();
    const article = page.querySelector("article.bd-article");
    const entry = anchor && page.getElementById(anchor.slice(1));
    const shown = entry && entry.matches("dt") ? entry.parentElement : article;
    return shown ? shown.textContent.replace(/\s+/g, " ").replace(/\\[()[\]]/g, "") : "";
  };

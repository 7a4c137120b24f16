// How the search ranks pages. Whoever searches has a question, so a page that answers one stands
// above a page that names every detail, but below the class or the function that has this name.
// The page of a library answers one too.
// The other numbers are Sphinx's own.
var Scorer = {
  score: ([page, _title, _anchor, description, score]) => {
    if (/^Python (class|function|exception)/.test(description)) return score + 40;
    if (page.startsWith("how-to/")) return score + 30;
    if (page.startsWith("reference/integrations/")) return score + 25;
    return page.startsWith("reference/") ? score - 5 : score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};

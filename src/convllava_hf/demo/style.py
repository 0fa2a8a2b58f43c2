"""The page's style sheet and what goes into its head."""

HEAD = '<meta name="viewport" content="width=device-width, initial-scale=1">'

CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
#header h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
#header p { margin: 0.15rem 0 0; color: var(--body-text-color-subdued); }
#chat { height: clamp(340px, calc(100vh - 330px), 640px); }
#chat .message { overflow-wrap: anywhere; }
/* It would send the image to the Hub's discussions; nothing leaves this page. */
#chat [aria-label="Share"] { display: none; }
#question .submit-button { background: var(--button-primary-background-fill); color: white; padding: 0 16px; }
#question .stop-button { background: #c62f22; color: white; padding: 0 16px; }
#question .submit-button, #question .stop-button { font-weight: 600; }
#examples > .gallery { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; }
#examples .gallery-item, #examples .gallery-item span, #examples .container {
  display: block; width: 100%; height: auto; max-width: none; max-height: none;
}
#examples img { width: 100%; height: auto; aspect-ratio: 1; object-fit: cover; }
#restart { align-self: flex-end; width: auto; flex: 0 0 auto; }
#status { min-height: 2.6rem; }
#status .note { color: var(--body-text-color-subdued); padding: 0.35rem 0.1rem; }
#status .error {
  padding: 0.55rem 0.8rem; border-radius: 8px; border: 1px solid #d33a2c; background: #fdecea; color: #8c1d13;
}
.dark #status .error { background: #3a1512; color: #ffb4ab; }
#status .figures { display: flex; flex-wrap: wrap; gap: 0.4rem 1.4rem; margin: 0; padding: 0.2rem 0.1rem; }
#status .figures dt { font-size: 0.72rem; color: var(--body-text-color-subdued); margin: 0; }
#status .figures dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
/* Browsers of phones zoom into a field whose letters are smaller than this. */
#question textarea { font-size: 16px; }
@media (max-width: 700px) {
  .gradio-container, .gradio-container > main { padding: 6px !important; }
  #header { padding: 4px; }
  #header h1 { font-size: 1.2rem; }
  #header p { font-size: 0.8rem; }
  #image { height: 230px !important; }
  #chat { height: 130px; }
  #chat:has(.message-row) { height: 46vh; min-height: 280px; }
  /* In one column, what is needed for a question comes before what is only looked at sometimes. */
  #columns { flex-direction: column; }
  #columns > .column { display: contents; }
  #columns > .column > .form:has(#resolution), #resolution { order: 1; }
  #settings { order: 2; }
}
"""

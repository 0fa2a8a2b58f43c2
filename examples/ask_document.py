"""Ask several questions about a page of a document.

    convllava convert ConvLLaVA/ConvLLaVA-sft-1536 ConvLLaVA-1536
    python examples/ask_document.py

The page keeps its shape and takes up to 576 visual tokens (`preset="large"`). The vision tower runs once: the prompt
cache keeps what the model has read, so that later answers start at once.
"""

from convllava_hf import assistant_turn, load, open_image, user_turn


QUESTIONS = ["What kind of document is this?", "What is its date?", "What is the total?"]

assistant = load("ConvLLaVA-1536", image_options={"preset": "large"}).with_prompt_cache()
page = open_image("page.png")

conversation = []
for question in QUESTIONS:
    conversation.append(user_turn(question, [] if conversation else [page]))
    answer = assistant.answer(conversation, max_new_tokens=128)
    conversation.append(assistant_turn(answer.text))
    print(f"{question}\n{answer.text}")
    print(f"({answer.visual_tokens} visual tokens, first token after {answer.first_token_seconds:.2f} s)\n")

"""How people word things: the phrasings of each kind of question, and how they type them.

{k} is a kind of shape, {c} a colour, {n} a noun ("star", "red shape", "blue circle"), {a} one with
its article, {p} its plural.
"""

from __future__ import annotations

from random import Random

LIST = (
    "What is in this image?",
    "What is in this image?",
    "What is in the image?",
    "What is in this picture?",
    "What is in the picture?",
    "What do you see?",
    "What can you see?",
    "What do you see in this image?",
    "What can you see in the image?",
    "What is shown in this image?",
    "What is shown in the picture?",
    "What does this image show?",
    "What does the picture show?",
    "What are the shapes in this image?",
    "Which shapes are in the image?",
    "Which shapes do you see?",
    "What shapes are in the picture?",
    "What shapes are there?",
    "What is this?",
    "What's in this image?",
    "What's in the picture?",
    "Describe the image.",
    "Describe this image.",
    "Describe the picture.",
    "Describe what you see.",
    "Describe this picture in a few words.",
    "List the shapes.",
    "List all shapes from left to right.",
    "Name the shapes in this image.",
    "Tell me what is in the image.",
)
COUNT = (
    "How many shapes are there?",
    "How many shapes are in this image?",
    "How many shapes are in the image?",
    "How many shapes are in the picture?",
    "How many shapes do you see?",
    "How many shapes can you see?",
    "How many shapes does the image show?",
    "How many objects are there?",
    "How many things are in this image?",
    "Count the shapes.",
    "What is the number of shapes?",
)
COLOUR = (
    "What colour is the {k}?",
    "What colour is the {k}?",
    "Which colour is the {k}?",
    "Which colour does the {k} have?",
    "What is the colour of the {k}?",
    "Tell me the colour of the {k}.",
    "The {k} is what colour?",
)
SHAPE = (
    "Which shape is {c}?",
    "What shape is {c}?",
    "What is {c}?",
    "Which object is {c}?",
    "What is the {c} shape?",
    "What shape is the {c} one?",
    "Which of the shapes is {c}?",
    "What kind of shape is the {c} one?",
)
WHERE = (
    "Where is the {n}?",
    "Where is the {n}?",
    "Where is the {n} in this image?",
    "Where is the {n} in the picture?",
    "Where can I find the {n}?",
    "Where do you see the {n}?",
    "In which part of the image is the {n}?",
    "What is the position of the {n}?",
)
EXISTS = ("Is there {a}?", "Is there {a} in this image?", "Do you see {a}?", "Can you see {a}?")
NUMBER = ("How many {p} are there?", "How many {p} do you see?", "How many {p} are in this image?")
WHICH_IMAGE = (
    "Which image has the {n}?",
    "Which image has the {n}?",
    "Which image shows the {n}?",
    "Which image contains the {n}?",
    "Which picture has the {n}?",
    "Which one has the {n}?",
    "In which image is the {n}?",
    "In which image do you see the {n}?",
    "Which of the images has the {n}?",
)
IMAGES = (
    "How many images are there?",
    "How many images do you see?",
    "How many pictures are there?",
    "How many pictures did I give you?",
)
EACH = (
    "What is in these images?",
    "What is in the images?",
    "What do the images show?",
    "What do these pictures show?",
    "Describe the images.",
    "Describe each image.",
    "What do you see in each image?",
)
MOTION = (
    "How does the {n} move?",
    "How does the {n} move?",
    "How does the {n} move in this video?",
    "What does the {n} do?",
    "What happens to the {n}?",
    "Which way does the {n} move?",
    "In which direction does the {n} move?",
    "How is the {n} moving?",
    "Describe how the {n} moves.",
)


def vary(rng: Random, question: str) -> str:
    """The question as different people type it."""
    if rng.random() < 0.3:
        question = question.replace("colour", "color").replace("centre", "center")
    if rng.random() < 0.1:
        question = question.replace("What is", "What's")
    pick = rng.random()
    if pick < 0.1:
        question = question[0].lower() + question[1:]
    elif pick < 0.15:
        question = question.lower()
    if rng.random() < 0.12 and not question[-1:].isalnum():
        question = question[:-1]
    return question

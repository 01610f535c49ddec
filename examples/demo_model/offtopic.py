"""Questions about anything but the demo's world, to which it says what it knows instead.

Words that are not of its world come to the model as pieces of a few letters. It is to learn that
such a word, wherever it stands, is none of its business; so most are drawn from lists, and some
are made up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

ANSWER = "I only know coloured shapes."

NAMES = """Anna Ben Maria Peter Napoleon Einstein Shakespeare Mozart Caesar Picasso Darwin Newton
Lincoln Gandhi Cleopatra Elvis Madonna Messi Ronaldo Federer Beethoven Bach Marie Julia Tom Alice
Bob Charlie David Emma Frank Grace Henry Isabel Jack Kate Leo Mia Noah Olivia Paul Queen Robert
Sarah Thomas Victor William Yuki Zoe""".split()
PLACES = """France Germany Italy Spain Japan China India Brazil Canada Australia Egypt Kenya Peru
London Paris Berlin Rome Madrid Tokyo Beijing Delhi Cairo Lima Oslo Vienna Europe Africa Asia
America Texas California Poland Sweden Norway Finland Greece Turkey Russia Mexico Chile Cuba
Portugal Ireland Scotland England Wales Denmark Iceland Hungary Austria Moscow Boston""".split()
THINGS = """dog cat car house tree bird horse cow person man woman child boy girl chair table lamp
phone computer book bottle cup plate fork knife spoon bicycle bus train plane boat ship road river
mountain lake sea beach cloud sun moon flower rose leaf apple banana bread cheese cake pizza hat
shirt shoe coat bag clock door window wall roof garden street city forest field bridge tower church
school shop hospital dragon robot monkey elephant lion tiger bear wolf fox rabbit mouse snake fish
shark whale frog duck chicken sheep pig goat bee spider butterfly ball guitar piano violin camera
television keyboard screen mirror pen pencil paper letter newspaper map flag sign traffic_light
pentagon hexagon oval ellipse cube sphere cylinder heart cross arrow line number word logo face
hand eye nose mouth ear hair leg arm foot smile football player team match game film song movie
teacher doctor policeman baby king president weather rain snow""".split()
VERBS = """cook eat drink write read draw sing play buy sell build fix wash open close drive fly
swim run walk dance sleep learn teach translate explain calculate install repair clean paint bake
grow plant find lose win stop start""".split()
ADJECTIVES = """old tall big small long heavy fast deep far expensive cold hot rich famous good bad
dangerous healthy strong high wide""".split()
WHOLE = """Hello|Hello!|Hi|Hi there|Hey|Good morning|Good evening|Thanks|Thank you|Thank you!|Bye
Who are you?|What are you?|What is your name?|What's your name?|How are you?|Are you a robot?
Who made you?|How old are you?|Can you help me?|Help|Help me|What can you do?|Tell me a joke.
Who won the match?|Who won?|What is the capital of France?|What time is it?|What day is it today?
What is the weather like?|What is the meaning of life?|Why is the sky blue?|Is it raining?
What does the text say?|Read the text.|What is written here?|Who is in the picture?
Who is in this image?|Who is the person in the image?|Where was this picture taken?
When was this photo taken?|Which camera took this?|What is the mood of the picture?
Is this a photo?|Is this real?|Who painted this?|Who drew this picture?|What is the person doing?
How many people are there?|How many people are in this image?|Is anyone in the picture?
Is there a person in the image?|Is there any text?|What is in the background?|Translate this.
Write a poem.|Write a story about the sea.|Write some code.|Sing a song.|Solve the equation.
What is two plus two?|Count to ten.|What is 2 + 2?|What is 12 times 7?|Calculate 15 / 3.
What are the news today?|Who is the president?|What should I eat today?|What is love?
Do you speak French?|Parlez-vous francais ?|Wie geht es dir?|Hola|Guten Tag|Bonjour|Ciao
Do you like music?|Do you have feelings?|Where do you live?|Recommend a film.|Give me a recipe.
Summarise the book.|Explain gravity.|Explain the theory of relativity.|Is it safe?|Why?|Why not?
How much does it cost?|How much is it?|What happened in 1945?|Which brand is it?|lol|ok|asdf|test
Who scored the goal?|What is the score?|What is the make of the car?|What breed is the dog?
What is the licence plate?|What food is this?|Is this food healthy?|What season is it?""".replace(
    "\n", "|"
).split("|")
TEMPLATES = (
    "What is the capital of {place}?",
    "Where is {place}?",
    "How many people live in {place}?",
    "Which language do they speak in {place}?",
    "What is the weather in {place}?",
    "How far is it from {place} to {place}?",
    "Who is the president of {place}?",
    "What is {place} known for?",
    "Tell me about {place}.",
    "Is {place} in {place}?",
    "When did {name} live?",
    "Who was {name}?",
    "Who is {name}?",
    "What did {name} write?",
    "Where was {name} born?",
    "How {adjective} is {name}?",
    "Do you know {name}?",
    "Is this {name}?",
    "Tell me about {name}.",
    "My name is {name}.",
    "What is a {thing}?",
    "What does a {thing} cost?",
    "How do I {verb} a {thing}?",
    "How {adjective} is a {thing}?",
    "How {adjective} is the {thing}?",
    "Why is the {thing} so {adjective}?",
    "Can you {verb} a {thing}?",
    "Can you {verb}?",
    "I want to {verb} a {thing}.",
    "Write a poem about a {thing}.",
    "Tell me a story about a {thing} and a {thing}.",
    "What do you think of {place}?",
    "Which {thing} is the best?",
    "Who invented the {thing}?",
    "Do you like the {thing}?",
    "What is the {thing} doing?",
    "Is there a {thing}?",
    "Is there a {thing} in this image?",
    "Is there a {thing} in the picture?",
    "Do you see a {thing}?",
    "Can you see a {thing}?",
    "Where is the {thing}?",
    "Where is the {thing} in this image?",
    "What colour is the {thing}?",
    "Which colour is the {thing}?",
    "What is the colour of the {thing}?",
    "How many {thing}s are there?",
    "How many {thing}s do you see?",
    "How many {thing}s are in this image?",
    "How does the {thing} move?",
    "What happens to the {thing}?",
    "Which image has the {thing}?",
    "What kind of {thing} is it?",
    "What is behind the {thing}?",
    "Describe the {thing}.",
    "Count the {thing}s.",
    "Is the {thing} {adjective}?",
    "Who owns the {thing}?",
    "Is this a {thing}?",
    "What is the name of the {thing}?",
    "{thing}",
    "{name} and {name}",
)
_ONSETS = "b c d f g h j k l m n p r s t v w z br cl dr fl gr pl pr sh sk st th tr".split()
_RHYMES = "a e i o u ai ea ee oo ou an en in on ar er or al el il am at et ip ock ust and".split()
_TAKEN = ("star", "square")


def _made_up(rng: Random) -> str:
    while True:
        count = rng.randint(1, 3)
        word = "".join(rng.choice(_ONSETS) + rng.choice(_RHYMES) for _ in range(count))
        if word not in _TAKEN:
            return word


def _word(rng: Random, words: Sequence[str]) -> str:
    if rng.random() < 0.2:
        word = _made_up(rng)
        return word.capitalize() if words[0][0].isupper() else word
    return rng.choice(words).replace("_", " ")


def off_topic(rng: Random) -> str:
    """One question, as it is typed or nearly so."""
    if rng.random() < 0.3:
        return rng.choice(WHOLE)
    text = rng.choice(TEMPLATES)
    lists = {
        "place": PLACES,
        "name": NAMES,
        "thing": THINGS,
        "verb": VERBS,
        "adjective": ADJECTIVES,
    }
    for name, words in lists.items():
        while "{" + name + "}" in text:
            text = text.replace("{" + name + "}", _word(rng, words), 1)
    return re.sub(r"\ba (?=[aeiou])", "an ", text)

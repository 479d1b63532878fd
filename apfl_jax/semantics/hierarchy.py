"""Class trees made by hand, in the manner of WordNet: human prior knowledge about classes, to be named as such.

A class is the indicator of the nodes between the root and itself, itself included, divided by its norm. So the cosine
of two classes is closed: (nodes that they share) / sqrt(nodes of one * nodes of the other). [O]; Barz and Denzler 2019
(arXiv 1809.09875) place classes by a taxonomy too, with other cosines.

A line of a tree is the path of a group, then its classes; a deeper group is a line of its own. The trees are ours and
were tuned on nothing; CIFAR-100's twenty superclasses are its authors' [C]. Digits have no meaning that an image shows:
their tree is of strokes.
"""

import numpy as np

from apfl_jax.semantics.lookup import find

_DIGITS = """
  straight: one, four, seven
  curved/open: two, three, five
  curved/closed: zero, eight
  curved/closed/stemmed: six, nine
"""

_FASHION_MNIST = """
  clothing/upper body/shirt: T-shirt/top, Shirt
  clothing/upper body/outerwear: Pullover, Coat
  clothing: Trouser, Dress
  footwear: Ankle boot
  footwear/shoe: Sandal, Sneaker
  accessory: Bag
"""

_CIFAR10 = """
  animal: bird, frog
  animal/mammal/carnivore: cat, dog
  animal/mammal/ungulate: deer, horse
  vehicle/craft: airplane, ship
  vehicle/motor vehicle: automobile, truck
"""

# Trees are spelt in two ways in copies of the data set: maple_tree and maple.
_CIFAR100 = """
  animal/mammal/aquatic mammals: beaver, dolphin, otter, seal, whale
  animal/mammal/large carnivores: bear, leopard, lion, tiger, wolf
  animal/mammal/large omnivores and herbivores: camel, cattle, chimpanzee, elephant, kangaroo
  animal/mammal/medium-sized mammals: fox, porcupine, possum, raccoon, skunk
  animal/mammal/people: baby, boy, girl, man, woman
  animal/mammal/small mammals: hamster, mouse, rabbit, shrew, squirrel
  animal/fish: aquarium_fish, flatfish, ray, shark, trout
  animal/reptiles: crocodile, dinosaur, lizard, snake, turtle
  animal/invertebrate/insects: bee, beetle, butterfly, caterpillar, cockroach
  animal/invertebrate/non-insect invertebrates: crab, lobster, snail, spider, worm
  plant/flowers: orchid, poppy, rose, sunflower, tulip
  plant/fruit and vegetables: apple, mushroom, orange, pear, sweet_pepper
  plant/trees: maple_tree, oak_tree, palm_tree, pine_tree, willow_tree, maple, oak, palm, pine, willow
  scene/large natural outdoor scenes: cloud, forest, mountain, plain, sea
  artifact/large man-made outdoor things: bridge, castle, house, road, skyscraper
  artifact/household/food containers: bottle, bowl, can, cup, plate
  artifact/household/household electrical devices: clock, keyboard, lamp, telephone, television
  artifact/household/household furniture: bed, chair, couch, table, wardrobe
  artifact/vehicle/vehicles 1: bicycle, bus, motorcycle, pickup_truck, train
  artifact/vehicle/vehicles 2: lawn_mower, rocket, streetcar, tank, tractor
"""

_FAST = """
  top: top left, top right
  bottom: bottom left, bottom right
"""


def _parse(text: str) -> dict[str, list[str]]:
  """Class name -> the nodes between the root and the class, itself the last."""
  nodes = {}
  for line in text.strip().splitlines():
    path, _, classes = line.strip().partition(": ")
    groups = path.split("/")
    above = ["/".join(groups[: depth + 1]) for depth in range(len(groups))]
    nodes.update({name: [*above, f"class {name}"] for name in classes.split(", ")})
  return nodes


_digits = _parse(_DIGITS)

HIERARCHIES = {
  "digits": _digits,
  "mnist": {
    str(digit): _digits[word]
    for digit, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"))
  },
  "fashion_mnist": _parse(_FASHION_MNIST),
  "cifar10": _parse(_CIFAR10),
  "cifar100": _parse(_CIFAR100),
  "fast": _parse(_FAST),
}


def hierarchy(class_names: tuple[str, ...], dataset_name: str) -> np.ndarray:
  """float64 [C, nodes]: rows of norm 1 in the order of `class_names`, a column for each node above or at a class.

  Raises:
    InputError: no tree for this data set, or a class that it does not hold.
  """
  tree = find(HIERARCHIES, "class tree", class_names, dataset_name)
  nodes = list(dict.fromkeys(node for name in class_names for node in tree[name]))
  table = np.array([[node in tree[name] for node in nodes] for name in class_names], np.float64)
  return table / np.linalg.norm(table, axis=1, keepdims=True)

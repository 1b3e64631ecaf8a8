"""The training of YOLOv7 once more, in plain Python: assignment and loss in loops over single boxes.

Written from the papers and the layout of the raw predictions, with nothing of the package in it. A box is (left, top,
right, bottom), an object (image, label, box), a candidate (level, image, anchor, row, column).
"""

import math

STRIDES = (8, 16, 32)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def area(box):
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def iou(a, b):
    common = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return common / (area(a) + area(b) - common)


def aspect_difference(a, b):
    return 4 / math.pi**2 * (math.atan((a[2] - a[0]) / (a[3] - a[1])) - math.atan((b[2] - b[0]) / (b[3] - b[1]))) ** 2


def aspect_weight(a, b):
    v = aspect_difference(a, b)
    return v / (1 - iou(a, b) + v) if v else 0.0


def ciou(a, b, weight=None):
    """Zheng et al. 2020, equations 8 to 11; `weight` is the paper's alpha."""
    centre_distance = ((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2
    diagonal = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
    weight = aspect_weight(a, b) if weight is None else weight
    return iou(a, b) - centre_distance / diagonal - weight * aspect_difference(a, b)


def find_candidates(sizes, objects, anchors, max_ratio):
    """`sizes` are (rows, columns) of each level."""
    found = set()
    for level, (rows, columns) in enumerate(sizes):
        for image, _, (left, top, right, bottom) in objects:
            x, y = (left + right) / 2 / STRIDES[level], (top + bottom) / 2 / STRIDES[level]
            cells = [(int(x), int(y))]
            if x - int(x) < 0.5 and x > 1:
                cells.append((int(x) - 1, int(y)))
            if x - int(x) > 0.5 and columns - x > 1:
                cells.append((int(x) + 1, int(y)))
            if y - int(y) < 0.5 and y > 1:
                cells.append((int(x), int(y) - 1))
            if y - int(y) > 0.5 and rows - y > 1:
                cells.append((int(x), int(y) + 1))
            for number, (width, height) in enumerate(anchors[level]):
                ratios = (right - left) / width, (bottom - top) / height
                if max(max(ratio, 1 / ratio) for ratio in ratios) < max_ratio:
                    found |= {(level, image, number, row, column) for column, row in cells}
    return sorted(found)


def read(raw, anchors, candidate):
    """The output of a candidate, and its box."""
    level, image, anchor, row, column = candidate
    output = raw[level][image, anchor, row, column].tolist()
    x, y = (
        (sigmoid(output[0]) * 2 - 0.5 + column) * STRIDES[level],
        (sigmoid(output[1]) * 2 - 0.5 + row) * STRIDES[level],
    )
    width, height = ((sigmoid(output[2 + axis]) * 2) ** 2 * anchors[level][anchor][axis] for axis in (0, 1))
    return output, (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def assign(raw, objects, anchors, max_ratio):
    """The number of the object of each candidate that has one."""
    candidates = find_candidates([tuple(level.shape[2:4]) for level in raw], objects, anchors, max_ratio)
    answers = {}
    for image in range(len(raw[0])):
        present = [number for number, (where, _, _) in enumerate(objects) if where == image]
        mine = [candidate for candidate in candidates if candidate[1] == image]
        costs, wanting = {}, {candidate: [] for candidate in mine}
        for number in present:
            _, label, box = objects[number]
            overlaps = {}
            for candidate in mine:
                output, predicted = read(raw, anchors, candidate)
                overlaps[candidate] = iou(box, predicted)
                shares = [math.sqrt(sigmoid(each) * sigmoid(output[4])) for each in output[5:]]
                of_classes = sum(-math.log(p if k == label else 1 - p) for k, p in enumerate(shares))
                costs[number, candidate] = of_classes - 3 * math.log(overlaps[candidate] + 1e-8)
            num_matches = max(1, int(sum(sorted(overlaps.values(), reverse=True)[:10])))
            for candidate in sorted(mine, key=lambda each: costs[number, each])[:num_matches]:
                wanting[candidate].append(number)
        for candidate, numbers in wanting.items():
            if len(numbers) == 1:
                answers[candidate] = numbers[0]
            elif numbers:
                answers[candidate] = min(present, key=lambda number: costs[number, candidate])
    return answers


def cross_entropy(output, target):
    share = sigmoid(output)
    return -target * math.log(share) - (1 - target) * math.log(1 - share)


def loss_of_image(raw, objects, anchors, image, answers, *, box_gain, objectness_gain, class_gain):
    """The published loss of one image alone, its levels with matches weighing what all three do."""
    num_classes = raw[0].shape[-1] - 5
    mine = {candidate: number for candidate, number in answers.items() if candidate[1] == image}
    box_terms, class_terms, objectness = [], [], 0.0
    for level, balance in enumerate((4.0, 1.0, 0.4)):
        targets, boxes, classes = {}, [], []
        for candidate, number in mine.items():
            if candidate[0] == level:
                output, predicted = read(raw, anchors, candidate)
                _, label, box = objects[number]
                targets[candidate[2:]] = max(0.0, ciou(predicted, box))
                boxes.append(1 - ciou(predicted, box))
                terms = [cross_entropy(each, float(k == label)) for k, each in enumerate(output[5:])]
                classes.append(sum(terms) / num_classes if num_classes > 1 else 0.0)
        if boxes:
            box_terms.append(sum(boxes) / len(boxes))
            class_terms.append(sum(classes) / len(classes))
        _, num_anchors, rows, columns, _ = raw[level].shape
        places = [(a, row, column) for a in range(num_anchors) for row in range(rows) for column in range(columns)]
        terms = [cross_entropy(raw[level][image][place][4].item(), targets.get(place, 0.0)) for place in places]
        objectness += balance * sum(terms) / len(terms)
    pixels = raw[0].shape[2] * raw[0].shape[3] * 64
    mean = lambda values: 3 * sum(values) / len(values) if values else 0.0  # noqa: E731
    return (
        box_gain * mean(box_terms)
        + objectness_gain * pixels / 640**2 * objectness
        + class_gain * num_classes / 80 * mean(class_terms)
    )

"""Which images of a folder or archive are for training, and what the label of each is.

Splits are folders with the names of splits. Labels come from a dataset.json (EDM, StyleGAN), from
a table (labels.csv, metadata.csv, ...), from files beside the images (a webdataset's .cls), from
class folders, or, only where asked for, from the beginning of the file names. A guess that could be
wrong without a word is refused, and the line says which flag decides.
"""
import csv
import io
import json
import os
import re
import unicodedata
from collections import Counter
from types import SimpleNamespace

from common.containers import way_in
from common.errors import UserError, need, reading
from common.listing import is_image, natural
from common.processes import log

# What folders of splits are called, in lower case, and words that may stand beside.
TRAIN = {"train", "training", "trn", "trainset"}
TEST = {"test", "testing", "tst", "testset"}
HELD = {"val", "valid", "validation", "dev", "eval", "evaluation", "heldout", "holdout"}
FILLERS = {"set", "data", "dataset", "images", "image", "imgs", "img", "seg", "split", "folder",
           "final", "the", "out", "hold", "held", "pictures", "photos", "samples"}
FOLDERS = "class folders"
# Folders of images, and of what lies beside them for other tasks.
PLAIN = {"images", "image", "imgs", "img", "jpegimages", "photos"}
BESIDE = {"annotations", "annotation", "masks", "mask", "labels", "label", "trimaps",
          "segmentation", "segmentations", "segmentationclass", "ground_truth", "groundtruth", "gt",
          "depth"}
TABLES = (".csv", ".tsv", ".jsonl")
LABEL_COLUMNS = {"label", "labels", "class", "classes", "category", "categories", "target",
                 "class_name", "classname", "label_name", "class_id", "label_id", "y"}


# ------------------------------------------------------------------------------------ splits
def split_word(name):
    """train, test or val where a folder's name is that of such a split, else None."""
    # trainSet, Train2017, seg_train, "Test Data".
    words = re.findall(r"[A-Z]?[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name))
    words = [word.lower() for word in words]
    words = [word for word in words if word not in FILLERS] or words
    if len(words) != 1:
        return "val" if words in (["held", "out"], ["hold", "out"]) else None
    for kind, known in (("train", TRAIN), ("test", TEST), ("val", HELD)):
        if words[0] in known:
            return kind
    return None


def inner_folder(listing, root):
    """The folder that `root` consists of, where nothing is to choose there; else None.

    That is a folder of folders (animals/{cat,dog}), or a split once more (train/train/).
    """
    below = listing.children(root)
    if len(below) != 1 or any(map(is_image, listing.loose(root))):
        return None
    inner = f"{root}/{below[0]}" if root else below[0]
    if split_word(below[0]) and split_word(root.rpartition("/")[2]):
        return inner
    if any(map(is_image, listing.loose(inner))) or not listing.children(inner):
        return None
    return inner


def unwrap(listing, root):
    """The folder at or below `root` where a choice begins."""
    while inner := inner_folder(listing, root):
        root = inner
    return root


def say_unwrapped(listing, outer, inner):
    """A warning that what would have been the only class is none."""
    names = inner[len(outer):].strip("/").split("/")
    if not all(split_word(name) for name in names if name):
        log(f"data.py: warning: {listing.where(outer)} holds one folder alone; what is in "
            f"{listing.where(inner)} is used (--labels-from none: no classes)")


def class_names(listing, root):
    """Names of the class folders of a split."""
    return listing.children(unwrap(listing, root))


def doubt(listing, root, text):
    """The error of a folder that can be read in two ways."""
    raise UserError(f"{listing.where(root)}: {text}; say which with --splits TRAIN [HELD_OUT] "
                    "(names of the folders), or --splits none where they are classes")


def find_splits(listing, root, wanted):
    """(folder of the training images, folders that may be the held-out ones, best first).

    wanted: --splits, or None to look at the names.
    """
    path = root + "/" if root else ""
    below = listing.children(root)
    if wanted == ["none"]:
        return root, []
    if wanted:
        for name in wanted:
            need(name in below, f"--splits {name}: no such folder in {listing.where(root)}; it "
                                f"holds {', '.join(below) or 'none'}")
        return path + wanted[0], [path + name for name in wanted[1:]]
    kinds = {name: split_word(name) for name in below}
    train = [name for name in below if kinds[name] == "train"]
    held = [name for name in below if kinds[name] in ("test", "val")]
    held.sort(key=lambda name: kinds[name] != "test")          # nobody has tuned on test/
    others = [name for name in below if not kinds[name]]
    if not (train or held):
        no_splits_below(listing, root, below)
        return root, []
    if len(train) != 1:
        # A class may well be called "test"; but two splits without training images are not all.
        doubt(listing, root, f"{', '.join(train or held)} look like splits, but not one folder "
                             "alone like the training images")
    inside = {name: class_names(listing, path + name) for name in below}
    if others and not held and not inside[train[0]]:
        # train/ beside other folders of images is a class, such as trains, buses and bikes.
        return root, []
    check_others(listing, root, train[0], held, others, inside)
    return path + train[0], [path + name for name in held]


def check_others(listing, root, train, held, others, inside):
    """Folders beside train/ may be left out only where it is certain that it is a split."""
    if not others:
        return
    sure = any(inside[name] and inside[name] == inside[train] for name in held)
    rival = any(inside[name] and inside[name] == inside[train] for name in others)
    if rival or not sure:
        doubt(listing, root, f"{', '.join([train, *held])} look like splits, but {others[0]} lies "
                             "beside, so they may be classes")
    log(f"data.py: warning: {listing.where(root)}: {', '.join(others)} beside the splits is left "
        "out")


def no_splits_below(listing, root, below):
    """UserError where every class folder holds train/ and test/: its images would be mixed."""
    path = root + "/" if root else ""
    kinds = [{split_word(name) for name in listing.children(path + c)} for c in below]
    if kinds and all("train" in k and k & {"test", "val"} for k in kinds):
        doubt(listing, root, f"each of {', '.join(below[:3])} holds folders of splits (train, test)"
                             ", whose images would be mixed; bring them into train/CLASS and "
                             "test/CLASS")


# ------------------------------------------------------------------------------------ tables
class Names:
    """Finds the image that an entry of a table means: by path, by file name, without suffix.

    images: names in the listing; table: that of the table; taken: images of the other split, whose
    file names mean them. find() gives None where there is no such file, "" where it is no image of
    these.
    """

    def __init__(self, listing, images, table, taken=()):
        root = table.rpartition("/")[0]
        self.start = root + "/" if root else ""
        self.files = listing.files
        self.images = set(images)
        self.base = {}
        self.stem = {}
        for name in (*images, *taken):
            base = name.rpartition("/")[2]
            # None: two images share it.
            for known, key in ((self.base, base), (self.stem, os.path.splitext(base)[0])):
                known[key] = None if key in known else name
        for name in taken:
            base = name.rpartition("/")[2]
            self.base[base] = self.stem[os.path.splitext(base)[0]] = None

    def find(self, entry):
        entry = str(entry).strip().replace("\\", "/").removeprefix("./")
        if self.start + entry in self.files:
            name = self.start + entry
            return name if name in self.images else ""
        base = entry.rpartition("/")[2]
        return self.base.get(base) or self.stem.get(base)


def is_of(table, kind):
    """Whether a table may be of a split of this kind: train.csv is not of the held-out images."""
    words = re.findall(r"[^\W\d_]+", table.rpartition("/")[2].lower())
    kinds = {k for k, known in (("train", TRAIN), ("held", TEST | HELD)) if known & set(words)}
    return not kinds or kind in kinds


def read_table(listing, name):
    """(columns, [row as a dict]) of a .csv, .tsv or .jsonl file."""
    text = listing.text(name)
    with reading(listing.where(name), "table", "write it again"):
        if name.endswith(".jsonl"):
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            return list(rows[0]) if rows else [], rows
        first = text.lstrip().split("\n")[0]
        # What separates the names of the columns.
        mark = max("\t;,", key=first.count)
        rows = csv.DictReader(io.StringIO(text.lstrip(), newline=""), delimiter=mark,
                              skipinitialspace=True)
        rows = [row for row in rows if any(v and v.strip() for v in row.values() if v)]
        return [c for c in (rows[0] if rows else {}) if c is not None], rows


def file_column(columns, rows, names):
    """(the column that names the images, how many of its entries are images of these)."""
    # Different ones: labels 0 and 1 are names of files, too, where there are 0.png and 1.png.
    known = {c: len({str(row.get(c)) for row in rows if names.find(row.get(c)) is not None})
             for c in columns}
    best = max(columns, key=known.get, default=None)
    return best, sum(bool(names.find(row.get(best))) for row in rows)


def label_column(where, columns, asked):
    """The column of labels among these."""
    if asked:
        need(asked in columns, f"--label-column {asked}: {where} has {', '.join(columns) or 'none'}"
                               "; name one of them")
        return asked
    known = [c for c in columns if c.strip().lower() in LABEL_COLUMNS]
    choice = known or columns
    need(len(choice) == 1, f"{where}: the columns {', '.join(columns) or '(none)'} could each be "
                           "the label; say which with --label-column NAME")
    return choice[0]


def table_labels(listing, name, images, taken, asked, sure=False):
    """{image: label} by a table, or None where it names none of the images.

    sure: None as well where no column is called as those of labels are.
    """
    names = Names(listing, images, name, taken)
    where = listing.where(name)
    columns, rows = read_table(listing, name)
    column, found = file_column(columns, rows, names)
    if not found:
        return None
    rest = [c for c in columns if c != column]
    if sure and not asked and not any(c.strip().lower() in LABEL_COLUMNS for c in rest):
        log(f"data.py: note: {where} names the images, but no column of it is called a label; the "
            "folders are used (--label-column NAME)")
        return None
    label = label_column(where, rest, asked)
    labels = {}
    for number, row in enumerate(rows, 2):
        image = names.find(row[column])
        value = word_of(row.get(label))
        if not image:
            continue
        need(value, f"{where}: row {number} ({row[column]}) has no {label}; fill it or remove it")
        need(labels.get(image, value) == value, f"{where}: {row[column]} has two labels, "
                                                f"{labels.get(image)} and {value}; give it one")
        labels[image] = value
    lost = [row[column] for row in rows if names.find(row[column]) is None]
    if lost:
        log(f"data.py: warning: {where} names {len(lost)} files that are not there, the first "
            f"{lost[0]}")
    many = len(set(labels.values()))
    need(many <= max(10, len(labels) // 2), f"{where}: {label} has {many} values for {len(labels)} "
         "images, which are no classes; say with --label-column which column is, or --labels-from "
         "none")
    return labels


def word_of(value):
    """A label as a word: 3, 3.0 and "3" are the same."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    word = "" if value is None else str(value).strip()
    return word.removesuffix(".0") if re.fullmatch(r"\d+\.0", word) else word


def edm_labels(listing, name, images, taken):
    """{image: label} by a dataset.json of EDM or StyleGAN; {} where it has none (labels: null).

    None where it is something else.
    """
    value = listing.json(name)
    if not isinstance(value, dict) or "labels" not in value:
        return None
    pairs = value["labels"]
    if pairs is None:
        return {}
    where = listing.where(name)
    with reading(where, "dataset.json of EDM: labels are [[file, label], ...]",
                 "make it again, or look elsewhere with --labels-from folders"):
        pairs = list(pairs.items()) if isinstance(pairs, dict) else [(a, b) for a, b in pairs]
    vectors = [a for a, b in pairs if isinstance(b, (list, dict))]
    need(not vectors, f"{where}: the label of {vectors[:1]} is a vector; this kit takes one class "
                      "an image")
    names = Names(listing, images, name, taken)
    labels = {}
    for file, label in pairs:
        image = names.find(file)
        need(image is not None, f"{where}: {file} is not there; is the data set complete?")
        if image:
            labels[image] = word_of(label)
    return labels


def beside_labels(listing, images, asked):
    """{image: label} by KEY.cls or KEY.json beside KEY.png, as in webdatasets; else None."""
    labels = {}
    for image in images:
        stem = os.path.splitext(image)[0]
        if stem + ".cls" in listing.files:
            labels[image] = listing.text(stem + ".cls").strip()
        elif stem + ".json" in listing.files:
            value = listing.json(stem + ".json")
            held = list(value) if isinstance(value, dict) else []
            if asked or LABEL_COLUMNS & {key.lower() for key in held}:
                key = label_column(listing.where(stem + ".json"), held, asked)
                labels[image] = word_of(value[key])
    return labels or None


def prefix_labels(listing, images):
    """{image: label} by what stands before the number at the end of the name: cat_0001.png."""
    labels = {}
    for image in images:
        stem = os.path.splitext(image.rpartition("/")[2])[0]
        match = re.fullmatch(r"(.+?)[\s_.\-(\[]*\d+[)\]]*", stem)
        need(match, f"{listing.where(image)}: --labels-from prefix needs names such as cat_0001, "
                    "and this one does not end in a number")
        labels[image] = match[1]
    return labels


# ------------------------------------------------------------------------------------ folders
def are_shards(listing, root, folders, images):
    """Whether numbered folders only share out the images: 00000/, 01000/ as of FFHQ, never classes.

    So it is where the numbers of the files run on from folder to folder.
    """
    widths = {len(f) for f in folders}
    if len(widths) != 1 or widths.pop() < 3 or not all(f.isdecimal() for f in folders):
        return False
    numbers = {}                                         # {folder: those in its files' names}
    for name, folder in folder_labels(listing, root, images, quiet=True).items():
        runs = re.findall(r"\d+", name.rpartition("/")[2])
        numbers.setdefault(folder, []).append(int(runs[-1]) if runs else -1)
    last = -1
    for folder in (f for f in folders if f in numbers):
        if min(numbers[folder]) <= last:
            need(len(folder) < 5, f"{listing.where(root)}: the folders {folders[0]}, ... are "
                 "numbered; say whether they are classes (--labels-from folders) or only share out "
                 "the images (--labels-from none)")
            return False
        last = max(numbers[folder])
    return True


def folder_labels(listing, root, images, quiet=False):
    """{image: class folder}, or {} without class folders."""
    folders = listing.children(root)
    loose = [n for n in listing.loose(root) if is_image(n)]
    if not folders:
        return {}
    if loose and not quiet:
        log(f"data.py: warning: {len(loose)} images lie in {listing.where(root)} itself, beside "
            "the class folders; they have no class and are left out")
    start = len(root) + 1 if root else 0
    return {n: n[start:].partition("/")[0] for n in images if "/" in n[start:]}


def ordered(listing, classes, top):
    """(the classes in the order of a classes.txt that names them all, {label: name to show})."""
    if not classes or "classes.txt" not in {n.rpartition("/")[2] for n in listing.loose(top)}:
        return classes, {}
    file = f"{top}/classes.txt" if top else "classes.txt"
    # Of macOS the names of folders are spelled with marks of their own.
    lines = [line.strip() for line in listing.text(file).splitlines()]
    known = {unicodedata.normalize("NFC", c): c for c in classes}
    names = [unicodedata.normalize("NFC", line) for line in lines if line]
    if sorted(names) == sorted(known):
        return [known[name] for name in names], {}
    if len(set(names)) == len(names) == len(classes) and set(classes) == set(
            map(str, range(len(classes)))):
        # Labels by number, and their names line by line.
        return sorted(classes, key=int), {str(k): name for k, name in enumerate(names)}
    log(f"data.py: note: {listing.where(file)} does not name the classes and is left out of "
        "account")
    return classes, {}


# ------------------------------------------------------------------------------------ all of it
def labels_of(listing, root, tops, how, images, taken=None):
    """({image: label}, in words where they come from) of a split, or ({}, ...) without classes.

    tops: where a table or dataset.json may lie. how: labels_from, label_column. taken: of a
    held-out split the training images.
    """
    given = how.labels_from
    if given == "none":
        return {}, "no labels (--labels-from none)"
    if given == "prefix":
        return prefix_labels(listing, images), "the beginning of the file names"
    if given == "folders":
        need(listing.children(root), f"{listing.where(root)}: --labels-from folders, but it holds "
                                     "no folder")
        return folder_labels(listing, root, images), FOLDERS
    by_file = labels_by_file(listing, tops, how, images, taken)
    if by_file and given == "auto":
        check_agreement(listing, root, images, *by_file)
    if by_file:
        return by_file
    need(given == "auto", f"--labels-from {given}: no such file in {listing.where(tops[-1])} that "
                          "names its images; give auto, folders, prefix, none or a file in it")
    folders = listing.children(root)
    if folders and are_shards(listing, root, folders, images):
        log(f"data.py: note: {listing.where(root)}: {folders[0]} ... are numbered shards, no "
            "classes (--labels-from folders would make them so)")
        return {}, "no labels (numbered shards)"
    labels = folder_labels(listing, root, images)
    if not labels:
        say_prefixes(images)
        return {}, "no labels"
    check_classes(listing, root, folders, len(images) - len(labels), len(labels))
    return labels, FOLDERS


def check_classes(listing, root, folders, loose, inside):
    """UserError where folders look as if they were no classes."""
    flags = "say --labels-from folders where they are classes, none where all images are one class"
    need(loose <= inside, f"{listing.where(root)}: {loose} images lie beside the folders "
                          f"{', '.join(folders[:3])}, and {inside} in them; {flags}")
    words = {f.lower() for f in folders}
    beside = words & BESIDE
    need(not (words & PLAIN and beside), f"{listing.where(root)}: {', '.join(folders[:4])} look "
         "like images and what belongs to them, not like classes; give the folder of the images "
         f"itself, or {flags}")


def check_agreement(listing, root, images, labels, source):
    """UserError where a table divides the images otherwise than the folders they lie in."""
    folders = listing.children(root)
    table = source.lower().endswith(TABLES)
    if not table or not folders or are_shards(listing, root, folders, images):
        return
    mine = folder_labels(listing, root, images, quiet=True)
    pairs = {(mine[n], labels[n]) for n in images if n in mine and n in labels}
    # One folder around all images says nothing.
    same = len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    need(same or len({a for a, _ in pairs}) == 1,
         f"{source} and the folders {', '.join(folders[:3])} divide the images otherwise; say "
         "which are the classes: --labels-from folders, or --labels-from FILE")


def labels_by_file(listing, tops, how, images, taken):
    """labels_of by a dataset.json, a table or files beside the images; else None."""
    asked = [n for top in tops for n in listing.loose(top)]
    if how.labels_from != "auto":
        asked = [n for n in asked if n.rpartition("/")[2] == how.labels_from]
    for name in asked:
        if name.rpartition("/")[2] == "dataset.json" or (
                how.labels_from != "auto" and name.endswith(".json")):
            labels = edm_labels(listing, name, images, taken or ())
            if labels is not None:
                return labels, listing.where(name)
    if how.labels_from == "auto":
        labels = beside_labels(listing, images, how.label_column)
        if labels:
            return labels, "files beside the images"
    found = {}
    for name in asked:
        base = name.rpartition("/")[2].lower()
        # A submission's labels are placeholders.
        fits = "submission" not in base and is_of(name, "train" if taken is None else "held")
        if base.endswith(TABLES) and (fits or how.labels_from != "auto"):
            # Beside class folders a table is only one of labels where it says so.
            sure = how.labels_from == "auto" and bool(listing.children(tops[0]))
            labels = table_labels(listing, name, images, taken or (), how.label_column, sure)
            if labels:
                found[name] = labels
    if not found:
        return None
    near = [n for n in found if n.rpartition("/")[0] == tops[0]] or list(found)
    need(len(near) == 1, f"{listing.where(tops[-1])}: {' and '.join(near)} both name the images; "
                         "say which holds the labels with --labels-from FILE")
    return found[near[0]], listing.where(near[0])


def say_prefixes(images):
    """A note where file names look as if they began with a class."""
    stems = [os.path.splitext(n.rpartition("/")[2])[0] for n in images]
    matches = [re.fullmatch(r"([^\W\d]\D*?)[\s_.\-]+\d+", stem) for stem in stems]
    names = Counter(match[1] for match in matches if match)
    if len(names) > 1 and sum(names.values()) == len(images) and len(names) <= len(images) // 2:
        shown = ", ".join(sorted(names)[:4])
        log(f"data.py: note: the file names begin with {shown}: --labels-from prefix would make "
            "these the classes")


def arrange(listing, how):
    """What data.py makes of a listing: a namespace of names and labels.

    how: labels_from, label_column, splits. train, and test or None: (names of images in order,
    their labels int, the folder they are named from); classes; source: where the labels come from,
    in words; strangers: names of files that are no images; places: the folders of the splits.
    """
    top = unwrap(listing, "")
    if how.labels_from == "none":
        top = ""
    train, held = find_splits(listing, top, how.splits)
    root = unwrap(listing, train)
    # A folder around the splits is nothing to speak of.
    say_unwrapped(listing, train if train != top else "", root)
    images = images_in(listing, train)
    if not images:
        raise UserError(no_image(listing, train, "folder"))
    labels, source = labels_of(listing, root, tops_of(root, train, top), how, images)
    if source == FOLDERS:
        empty = sorted(set(listing.children(root)) - set(labels.values()), key=natural)
        if empty:
            folder = f"{root}/{empty[0]}" if root else empty[0]
            raise UserError(no_image(listing, folder, "class folder"))
    images = labelled(images, labels, source)
    classes, shown = ordered(listing, sorted(set(labels.values()), key=natural), top)
    number = {c: k for k, c in enumerate(classes)}
    out = SimpleNamespace(classes=[shown.get(c, c) for c in classes], source=source, test=None,
                          places=[train], strangers=strangers(listing, train))
    out.train = in_order(images, labels, number, source, root)
    for place in held:
        if held_out(listing, place, top, how, out, number):
            break
    return out


def images_in(listing, folder):
    return sorted((n for n in listing.inside(folder) if is_image(n)), key=natural)


def strangers(listing, folder):
    """Names of files in a folder that are neither images nor what says their labels."""
    return [n for n in listing.inside(folder) if not is_image(n)
            and n.rpartition("/")[2] not in ("classes.txt", "dataset.json")
            and not n.lower().endswith((*TABLES, ".cls"))]


def in_order(images, labels, number, source, root):
    """(names, labels, root): those of class folders class by class."""
    found = [number[labels[n]] if labels else 0 for n in images]
    if source == FOLDERS:
        order = sorted(range(len(images)), key=found.__getitem__)
        images = [images[i] for i in order]
        found = [found[i] for i in order]
    return images, found, root


def tops_of(root, split, top):
    """Where a split's table may lie: in it, or above it."""
    return list(dict.fromkeys([root, split, top, ""]))


def labelled(images, labels, source):
    """The images that have a label."""
    if not labels:
        return images
    rest = [n for n in images if n not in labels]
    if rest and source != FOLDERS:
        log(f"data.py: warning: {len(rest)} images have no label by {source} and are left out, the "
            f"first {rest[0]}")
    return [n for n in images if n in labels]


def held_out(listing, place, top, how, out, number):
    """Makes a folder the held-out split of `out`; False where its images have no labels."""
    root = unwrap(listing, place)
    images = images_in(listing, place)
    if not images:
        log(f"data.py: warning: {listing.where(place)} holds no image and is left out")
        return False
    labels, source = labels_of(listing, root, tops_of(root, place, top), how, images, out.train[0])
    if number and not labels:
        log(f"data.py: warning: {listing.where(place)} has no labels and is left out")
        return False
    theirs = set(labels.values())
    need(theirs <= set(number) and bool(theirs) == bool(number),
         f"{listing.where(place)}: its classes do not match those of "
         f"{listing.where(out.train[2])}; both need the same names (--splits TRAIN leaves it out)")
    out.test = in_order(labelled(images, labels, source), labels, number, source, root)
    out.places.append(place)
    out.strangers += strangers(listing, place)
    return True


def no_image(listing, folder, kind):
    """The words about a folder without an image; what it holds instead, where that is known."""
    way = way_in(listing, folder)
    return way or f"{listing.where(folder)}: no image in this {kind}; remove it or fill it"

"""Sets of names as libstdc++ keeps them, made by hand to be damaged, and names planted into the set of torch itself."""

import ctypes
import os

WORD = 8
FUNCTION = "_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig14getMutableKeysB5cxx11Ev"
BUCKETS, COUNT_OF_BUCKETS, FIRST, COUNT, LOAD, SINGLE = 0, 8, 16, 24, 32, 48  # of a std::unordered_set<std::string>
NEXT, TEXT, LENGTH, HERE, HASH = 0, 8, 16, 24, 40  # of one of its nodes


def word(address):
    """The 64-bit word at an address, to read and to set as `.value`."""
    return ctypes.c_uint64.from_address(address)


def hash_of(name):
    """std::hash<std::string> of libstdc++."""
    function = ctypes.CDLL("libstdc++.so.6")["_ZSt11_Hash_bytesPKvmm"]
    function.restype, function.argtypes = ctypes.c_size_t, (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t)
    return function(name.encode(), len(name), 0xC70F6907)


def _room(size):
    """Zeroed memory that C++ can free: the set of torch ends with its process."""
    libc = ctypes.CDLL(None)
    libc.calloc.restype, libc.calloc.argtypes = ctypes.c_uint64, (ctypes.c_size_t, ctypes.c_size_t)
    return libc.calloc(1, size)


def new_node(name):
    """A node of a set: its string on the heap where it has more than 15 letters."""
    node, letters = _room(48), name.encode()
    place = node + HERE if len(letters) < 16 else _room(len(letters) + 1)
    ctypes.memmove(place, letters + b"\0", len(letters) + 1)
    word(node + TEXT).value, word(node + LENGTH).value, word(node + HASH).value = place, len(letters), hash_of(name)
    if place != node + HERE:
        word(node + HERE).value = len(letters)
    return node


class Names:
    """A set with these names in so many buckets; `node` gives the address of each."""

    def __init__(self, names, buckets):
        self.address, self.node = _room(56), {}
        table = _room(WORD * buckets) if buckets > 1 else self.address + SINGLE
        word(self.address + BUCKETS).value, word(self.address + COUNT_OF_BUCKETS).value = table, buckets
        ctypes.c_float.from_address(self.address + LOAD).value = 1.0
        for name in names:
            self.node[name] = insert(self.address, name)

    def read(self):
        """The names that the chain holds."""
        return read(self.address)


def insert(address, name):
    """Put a name into a set with room for it, as libstdc++ does: first of its bucket, else of all. Returns its node."""
    node, count = new_node(name), word(address + COUNT_OF_BUCKETS).value
    entry = lambda of: word(word(address + BUCKETS).value + WORD * (word(of + HASH).value % count))
    before = entry(node).value
    if before:
        word(node + NEXT).value = word(before).value
        word(before).value = node
    else:
        following = word(address + FIRST).value
        word(node + NEXT).value = following
        word(address + FIRST).value = node
        entry(node).value = address + FIRST
        if following:
            entry(following).value = node
    word(address + COUNT).value += 1
    return node


def read(address):
    """The names that the chain of a set holds."""
    names, node = [], word(address + FIRST).value
    while node:
        names.append(ctypes.string_at(word(node + TEXT).value, word(node + LENGTH).value).decode())
        node = word(node + NEXT).value
    return names


def torch_set():
    """The address of the set that this process's torch has."""
    import torch

    function = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so"))[FUNCTION]
    function.restype = ctypes.c_uint64
    return function()

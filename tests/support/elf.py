"""What stands in ELF files, of 64 bits and little-endian: sections, and what a shared library needs."""

import struct

WEAK = 2


def sections(elf):
    """Name, offset, size, and the number of the section that it is linked to, of each section in turn."""
    table = struct.unpack_from("<Q", elf, 0x28)[0]
    size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    # name, type, flags, address, offset, size, link
    found = [struct.unpack_from("<IIQQQQI", elf, table + i * size) for i in range(count)]
    names = found[names_index][4]
    return [(text(elf, names + each[0]), each[4], each[5], each[6]) for each in found]


def text(elf, at):
    return elf[at : elf.index(b"\0", at)].decode()


def entries(elf, section, form):
    """The entries of a section, with the offset of the strings that they name."""
    found = sections(elf)
    offset, size, strings = next(each[1:] for each in found if each[0] == section)
    return struct.iter_unpack(form, elf[offset : offset + size]), found[strings][1]


def needed(elf):
    """The libraries that a shared library asks for."""
    tags, strings = entries(elf, ".dynamic", "<qQ")
    return [text(elf, strings + value) for tag, value in tags if tag == 1]


def functions(elf):
    """{address: name} of the functions in the table of symbols, local ones too."""
    symbols, strings = entries(elf, ".symtab", "<IBBHQQ")
    return {value: text(elf, strings + name) for name, kind, _, _, value, _ in symbols if kind & 15 == 2}


def weak_undefined(elf):
    """The symbols that a shared library takes from others, or goes without."""
    symbols, strings = entries(elf, ".dynsym", "<IBBHQQ")
    return [
        text(elf, strings + name)
        for name, info, _, section, *_ in symbols
        if info >> 4 == WEAK and not section
    ]

"""Lean's elaborator with the library imported before the fork: what reading the same modules for every file costs, once.

A child forked from here elaborates a file as `lean --json -o` does for one without a header, with the same messages, exit
code and `.olean` file (tests compare both). Children share nothing but what the trusted library is; a submission is first
looked at in its own child, behind its own walls.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from miles_lean.judge.names import Name
from miles_lean.judge.objects import NIL, POINTER, NoKernel, Objects, bind

_BYTE = ctypes.c_uint8
_STACK = "_ZN4lean7lthread21set_thread_stack_sizeEm"
_STACK_SIZE = 8 << 20
"""Bytes of a Lean thread's stack, as `lean -s8192`: a deep recursion shall crash soon, not after hundreds of megabytes."""
_REPORT = "l___private_Lean_Language_Basic_0__Lean_Language_reportMessages"
_ENTRIES = {
    "lean_initialize": (),
    "lean_enable_initializer_execution": (),
    "lean_init_search_path": (),
    "lean_io_mark_end_initialization": (),
    "lean_shell_options_mk": (POINTER,),
    "l_Lean_importModules": (POINTER, POINTER, ctypes.c_uint32, POINTER, _BYTE, _BYTE, _BYTE, POINTER),
    "l_Lean_Environment_setMainModule": (POINTER, POINTER),
    _STACK: (ctypes.c_size_t,),
    "lean_init_task_manager_using": (ctypes.c_uint,),
    "l_Lean_Parser_mkInputContext___redArg": (POINTER, POINTER, _BYTE, POINTER),
    "l_Lean_Parser_parseHeader": (POINTER,),
    "l_Lean_Elab_HeaderSyntax_imports": (POINTER, _BYTE),
    "l_Lean_Elab_Command_mkState": (POINTER, POINTER, POINTER),
    "l_Lean_Elab_IO_processCommands": (POINTER, POINTER, POINTER),
    _REPORT: (POINTER, POINTER, _BYTE, POINTER, POINTER),
    "l_Lean_writeModule": (POINTER, POINTER, _BYTE),
    "lean_io_result_show_error": (POINTER,),
}
_EMPTY_MAP = 3
"""A search tree without entries."""
_TRUST = 1025
"""The trust level of Lean's command line: imported modules are not checked again."""
_PRIVATE = 2
"""Import level of a file that is no `module`."""
_ARENA_SIZE = 1 << 27


class WarmLean:
    """The environment of a file without a header, made in a process of one thread. LEAN_PATH says where the modules are.

    Raises NoKernel when the library lacks an entry point or the modules cannot be imported.
    """

    def __init__(self, library: Path, main: Name) -> None:
        """`main` is the name of the module that is compiled."""
        self._lib = lib = bind(library, _ENTRIES)
        lib.lean_initialize()
        self.objects = objects = Objects(lib, _ARENA_SIZE)
        lib.lean_enable_initializer_execution()
        self._done(lib.lean_init_search_path())
        self._options = objects.immortal(objects.ctor(lib.lean_shell_options_mk(NIL))[1][0])
        lib.lean_io_mark_end_initialization()
        _, header, _, _ = self._parse_header("", "")
        imports = lib.l_Lean_Elab_HeaderSyntax_imports(header, 1)
        # Marked persistent: children count no references in it, and so copy none of its pages.
        made = lib.l_Lean_importModules(imports, self._options, _TRUST, objects.array(()), 1, 1, _PRIVATE, _EMPTY_MAP)
        self._environment = objects.immortal(lib.l_Lean_Environment_setMainModule(self._done(made), objects.name(main)))

    def _done(self, result: int) -> int:
        """The value of an action that must not fail."""
        tag, fields = self.objects.ctor(result)
        if tag != 0 or not fields:
            raise NoKernel(f"{self._lib._name}: Lean could not import its library")
        return fields[0]

    def _parse_header(self, source: str, file_name: str) -> tuple[int, int, int, int]:
        """Input context, header, parser state behind it, messages."""
        lib, objects = self._lib, self.objects
        end = objects.nat(len(source.encode()))
        made = lib.l_Lean_Parser_mkInputContext___redArg(objects.string(source), objects.string(file_name), 1, end)
        context = objects.immortal(made)
        _, (header, rest) = objects.ctor(self._done(lib.l_Lean_Parser_parseHeader(context)))
        _, (state, messages) = objects.ctor(rest)
        return context, header, state, messages

    def compile(self, source: str, file_name: str, olean: str) -> int:
        """Elaborate a file without a header, print what Lean says, write the module if it said no error: the exit code.

        In a child process, once; the caller ends the process. A source that breaks Lean may end it earlier.
        """
        lib, objects = self._lib, self.objects
        getattr(lib, _STACK)(_STACK_SIZE)
        lib.lean_init_task_manager_using(1)
        context, _, parser, messages = self._parse_header(source, file_name)
        if not self._reported(messages):
            return 1
        state = lib.l_Lean_Elab_Command_mkState(self._environment, messages, self._options)
        done = self._done(lib.l_Lean_Elab_IO_processCommands(context, parser, state))
        environment, messages = objects.ctor(objects.ctor(done)[1][0])[1][:2]
        if not self._reported(messages):
            return 1
        written = lib.l_Lean_writeModule(environment, objects.string(olean), 0)
        if objects.ctor(written)[0] != 0:
            lib.lean_io_result_show_error(written)
            return 1
        return 0

    def _reported(self, messages: int) -> bool:
        """Print messages as JSON lines; whether there was no error among them."""
        log = self.objects.immortal(messages)  # used again by the caller
        tag, fields = self.objects.ctor(getattr(self._lib, _REPORT)(log, self._options, 1, _EMPTY_MAP, NIL))
        return tag == 0 and fields[0] == NIL  # how many errors, as a small number

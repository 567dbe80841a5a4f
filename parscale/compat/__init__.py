"""The undocumented names of other libraries that parscale uses: one module for each library.

A name belongs here if it begins with an underscore or its library does not document it: a later version may rename or
remove it without notice. Each such name is one function, whose docstring says why no documented name is enough. No
other module of parscale uses such a name (`tests/compat/test_private_names.py` reads the source of all packages), and
`tests/compat` checks that each exists and works as assumed.

If a version lacks a name, `parscale.errors.IncompatibleVersionError` is raised when the name is needed, not earlier: a
name for quantized models does not affect other models. The message names the library, its version and what to install.

Patches, which change another library in this process, are here too. Each is explained, and can be undone where
possible.

Modules:

- `parscale.compat.names`: looks up names, and makes the message for a missing one
- `parscale.compat.patching`: extends functions of libraries
- `parscale.compat.arguments`: names of arguments that models take, and their meaning
- one module for each library, with its names

`parscale.kernels` imports nothing of parscale and has its own `parscale.kernels.compat`.
"""

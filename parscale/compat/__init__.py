"""What parscale needs of other libraries beyond their documented interface: one module for each library.

A name belongs here if it begins with an underscore, or if its library documents it nowhere: a later version may rename
or drop it without notice. Each such name is one function, whose docstring says why no documented name does. Nothing
else in parscale uses such a name (`tests/compat/test_private_names.py` reads the source of all packages), and
`tests/compat` shows for each that it is there and does what is assumed.

A version that lacks a name raises `parscale.errors.IncompatibleVersionError` when the name is needed, and not
before: what is needed by quantized models only does not stand in the way of others. The message names the library, its
version and what to install.

Patches, which change how another library works in this process, are here too. Each is explained, and undone where that
is possible.

Module: holds.

- `parscale.compat.names`: the lookup, and the message of a missing name
- `parscale.compat.patching`: extending functions of libraries
- `parscale.compat.arguments`: names of arguments that models take, and what they hold
- one for each library: its names

`huggingface_hub` has no module here, since documented names are enough. `parscale.kernels` imports nothing of
parscale, and has its own `parscale.kernels.compat`.
"""

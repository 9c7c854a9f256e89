#pragma once

#include <pybind11/pybind11.h>

void bind_decode(pybind11::module_& module);

#pragma once

#include <pybind11/pybind11.h>

void bind_linear(pybind11::module_& module);

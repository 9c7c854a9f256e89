#pragma once

#include <pybind11/pybind11.h>

void bind_paged_kv(pybind11::module_& module);

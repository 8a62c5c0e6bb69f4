// The only file that includes pybind11.
#include <pybind11/pybind11.h>
PYBIND11_MODULE(_C, m) { m.doc() = "Halfturn's compiled engine"; }

# The CPU operators under AddressSanitizer and UndefinedBehaviorSanitizer, for fuzz.py beside this
# file: make -j -f tests/fuzz/library.mk PYTHON=.venv/bin/python
#
# Needs GCC and a PyTorch. Built are the kernels for any processor and the best ones of this one;
# FUZZ_KERNELS="portable avx2 avx512" adds others that it can run.

PYTHON ?= python3
CXX = g++
FOLDER := build/sanitized

TORCH := $(shell $(PYTHON) -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
BEST := $(shell grep -qsw avx512vl /proc/cpuinfo && echo avx512 || { grep -qsw avx2 /proc/cpuinfo && echo avx2; })
FUZZ_KERNELS ?= portable $(BEST)
MISSING := $(filter-out $(FUZZ_KERNELS),portable avx2 avx512)

SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all
FLAGS := -std=c++17 -O1 -g1 -fPIC -fno-omit-frame-pointer -ffp-contract=fast \
	-fvisibility=hidden -Wno-psabi -Wno-ignored-attributes \
	-DTORCH_TARGET_VERSION=0x020b000000000000 -Icsrc -isystem $(TORCH)/include
UNITS := $(FUZZ_KERNELS:%=ms_deform_attn/cpu_%) ms_deform_attn/cpu registration
OBJECTS := $(UNITS:%=$(FOLDER)/%.o) $(FOLDER)/missing.o

$(FOLDER)/_C.so: $(OBJECTS)
	$(CXX) -shared $(SANITIZERS) $^ -L$(TORCH)/lib -ltorch_cpu -o $@

$(FOLDER)/%.o: csrc/%.cpp tests/fuzz/library.mk
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) $(SANITIZERS) -MMD -MP -c $< -o $@

# Stands in for the kernels that are not built; made again only when their choice changes.
$(FOLDER)/missing.o: $(FOLDER)/missing.cpp
	$(CXX) $(FLAGS) $(SANITIZERS) -c $< -o $@

MISSING_SOURCE := \#include "ms_deform_attn/arguments.h"\nnamespace dn_detr {\n$(foreach set,$(MISSING),const CpuKernels* $(set)_kernels() { return nullptr; }\n)}
$(FOLDER)/missing.cpp: always
	@mkdir -p $(@D)
	@printf '%b\n' '$(MISSING_SOURCE)' | cmp -s - $@ || printf '%b\n' '$(MISSING_SOURCE)' > $@

.PHONY: always
-include $(OBJECTS:.o=.d)

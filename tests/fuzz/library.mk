# The operators under AddressSanitizer and UndefinedBehaviorSanitizer, for fuzz.py beside this file:
#
#   make -j -f tests/fuzz/library.mk PYTHON=.venv/bin/python build/sanitized/C.so
#
# Needs GCC and a PyTorch. Built are the kernels for any processor and the best ones of this one;
# FUZZ_KERNELS="portable avx2 avx512" adds others that it can run. build/sanitized/emulated.so has
# the CUDA kernels over the tests' emulator of CUDA.

PYTHON ?= python3
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

EMULATED := cuda cuda_kernels emulator
EMULATED := $(EMULATED:%=$(FOLDER)/emulated/%.o)

$(FOLDER)/C.so: $(OBJECTS)
$(FOLDER)/emulated.so: $(EMULATED)
$(FOLDER)/%.so:
	$(CXX) -shared $(SANITIZERS) $^ -L$(TORCH)/lib -ltorch_cpu -ldl -o $@

$(FOLDER)/%.o: csrc/%.cpp tests/fuzz/library.mk
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) $(SANITIZERS) -MMD -MP -c $< -o $@

$(EMULATED): FLAGS += -std=c++20 -DDN_DETR_EMULATED -Itests/ops/emulator -Wno-unknown-pragmas
$(FOLDER)/emulated/cuda.o: csrc/ms_deform_attn/cuda.cpp
$(FOLDER)/emulated/cuda_kernels.o: csrc/ms_deform_attn/cuda.cu
$(FOLDER)/emulated/emulator.o: tests/ops/emulator/emulator.cpp
$(EMULATED): tests/fuzz/library.mk
$(EMULATED): $(FOLDER)/emulated/%.o:
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) $(SANITIZERS) -MMD -MP -x c++ -c $< -o $@

# Stands in for the kernels that are not built; made again only when their choice changes.
$(FOLDER)/missing.o: $(FOLDER)/missing.cpp
	$(CXX) $(FLAGS) $(SANITIZERS) -c $< -o $@

MISSING_SOURCE := \#include "ms_deform_attn/arguments.h"\nnamespace dn_detr {\n$(foreach set,$(MISSING),const CpuKernels* $(set)_kernels() { return nullptr; }\n)}
$(FOLDER)/missing.cpp: always
	@mkdir -p $(@D)
	@printf '%b\n' '$(MISSING_SOURCE)' | cmp -s - $@ || printf '%b\n' '$(MISSING_SOURCE)' > $@

.PHONY: always
-include $(OBJECTS:.o=.d) $(EMULATED:.o=.d)

// What a library tells about itself once it is loaded; setup.py defines the values.

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Changes with the operators' schemas: dn_detr.ops uses no library with another number.
EXPORTED int dn_detr_interface() { return DN_DETR_INTERFACE; }

// JSON: versions of what built the library, and a digest of the sources.
EXPORTED const char* dn_detr_build_info() { return DN_DETR_BUILD_INFO; }

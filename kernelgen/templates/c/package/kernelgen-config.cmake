# find_package(kernelgen) gives the target kernelgen::kernelgen.
include(CMakeFindDependencyMacro)
include("${CMAKE_CURRENT_LIST_DIR}/kernelgen-targets.cmake")
get_target_property(_kernelgen_type kernelgen::kernelgen TYPE)
get_target_property(_kernelgen_links kernelgen::kernelgen INTERFACE_LINK_LIBRARIES)
if(_kernelgen_type STREQUAL "STATIC_LIBRARY" AND "${_kernelgen_links}" MATCHES "OpenMP")
  find_dependency(OpenMP COMPONENTS C)
endif()

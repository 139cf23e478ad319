# Installation and the CMake package: find_package(snapmla) gives the target snapmla::snapmla.
get_property(layers GLOBAL PROPERTY SNAPMLA_LAYERS)
add_library(snapmla_snapmla INTERFACE)
target_link_libraries(snapmla_snapmla INTERFACE ${layers})
target_compile_features(snapmla_snapmla INTERFACE cxx_std_20)
add_library(snapmla::snapmla ALIAS snapmla_snapmla)
set_target_properties(snapmla_snapmla PROPERTIES EXPORT_NAME snapmla)
install(TARGETS ${layers} snapmla_snapmla EXPORT snapmlaTargets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
# The installed program finds the shipped model relative to itself.
install(DIRECTORY models/snapmla-20m DESTINATION ${CMAKE_INSTALL_DATADIR}/snapmla)
install(EXPORT snapmlaTargets NAMESPACE snapmla:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/snapmla)
include(CMakePackageConfigHelpers)
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/snapmlaConfig.cmake.in
  ${PROJECT_BINARY_DIR}/snapmlaConfig.cmake
  INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/snapmla)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/snapmlaConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/snapmlaConfig.cmake
  ${PROJECT_BINARY_DIR}/snapmlaConfigVersion.cmake
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/snapmla)

# Targets of this project: one static library per directory of src/ (its layer), one test
# executable per directory of tests/. Sources are found by glob so that adding a file is enough.

# g++ must not contract a*b+c on its own: numeric/ decides bits, and host and device must agree.
set(SNAPMLA_COMPILE_OPTIONS -Wall -Wextra -Wconversion -Werror -ffp-contract=off)

function(snapmla_target_defaults target)
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${SNAPMLA_COMPILE_OPTIONS}>")
  target_include_directories(${target} PUBLIC
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
    $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>
    PRIVATE ${PROJECT_SOURCE_DIR}/src)
  if(SNAPMLA_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${SNAPMLA_SANITIZE}
      -fno-omit-frame-pointer -fno-sanitize-recover=all -g1)
    target_link_options(${target} PUBLIC -fsanitize=${SNAPMLA_SANITIZE})
  endif()
endfunction()

# For targets that only parse, print and compare: their compile time is what counts (JSON, flags and
# test macros are templates).
function(snapmla_compile_fast target)
  if(CMAKE_BUILD_TYPE STREQUAL "Debug")
    return()
  endif()
  set(level -O1)
  if(SNAPMLA_SANITIZE)
    set(level -O0)
  endif()
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${level}>")
endfunction()

# snapmla_layer(<name> DIR <dir> [DEPS <targets>...]): library snapmla_<name> from src/<dir>/*.cpp.
# A layer without sources becomes an interface library (headers only).
function(snapmla_layer name)
  cmake_parse_arguments(ARG "" "DIR" "DEPS" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/${ARG_DIR}/*.cpp)
  set(target snapmla_${name})
  if(sources)
    add_library(${target} STATIC ${sources})
    snapmla_target_defaults(${target})
    target_link_libraries(${target} PUBLIC ${ARG_DEPS})
  else()
    add_library(${target} INTERFACE)
    target_include_directories(${target} INTERFACE
      $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>)
    target_link_libraries(${target} INTERFACE ${ARG_DEPS})
  endif()
  set_property(GLOBAL APPEND PROPERTY SNAPMLA_LAYERS ${target})
endfunction()

# snapmla_test(<name> DIR <dir> DEPS <targets>... [LABELS <labels>...]): executable test_<name> from
# tests/<dir>/*_test.cpp. Its main (tests/support/main.cpp) fails when no test ran.
function(snapmla_test name)
  cmake_parse_arguments(ARG "" "DIR;TIMEOUT" "DEPS;LABELS" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/tests/${ARG_DIR}/*.cpp)
  if(NOT sources)
    message(FATAL_ERROR "tests/${ARG_DIR} holds no source file")
  endif()
  set(target test_${name})
  add_executable(${target} ${sources} ${PROJECT_SOURCE_DIR}/tests/support/main.cpp)
  snapmla_target_defaults(${target})
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/tests)
  target_compile_definitions(${target} PRIVATE
    SNAPMLA_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  target_link_libraries(${target} PRIVATE ${ARG_DEPS} GTest::gtest GTest::gmock)
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 900)  # seconds; generous, since a shared machine may be slow
  endif()
  add_test(NAME ${name} COMMAND ${target})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS "${ARG_LABELS}")
endfunction()

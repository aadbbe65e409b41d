# ATTUNE_STATIC: links the archive of a library where the system has one beside the shared library,
# so that a program runs on machines without that package. What has none (oneDNN, Gloo,
# prometheus-cpp on Debian 12) stays shared, as the C and C++ run-time libraries do; bundle.sh packs
# it. Call after every find_package.

# /usr/lib/libx.so.1.2 -> /usr/lib/libx.a if that exists, else the path as it was.
function(attune_archive_of path result)
  set(${result} "${path}" PARENT_SCOPE)
  string(REGEX REPLACE "\\.so[.0-9]*$" ".a" archive "${path}")
  if(path MATCHES "^/.*\\.so" AND EXISTS "${archive}")
    set(${result} "${archive}" PARENT_SCOPE)
  endif()
endfunction()

function(attune_link_archives)
  get_property(targets DIRECTORY PROPERTY IMPORTED_TARGETS)
  foreach(target ${targets})
    # oneDNN and we must share one OpenMP; CUDA's are chosen where they are used.
    if(target MATCHES "^(CUDA|OpenMP)::")
      continue()
    endif()
    get_target_property(type ${target} TYPE)
    foreach(config "" _NONE _RELEASE _RELWITHDEBINFO)
      if(type STREQUAL "INTERFACE_LIBRARY" OR type STREQUAL "EXECUTABLE")
        continue()
      endif()
      get_target_property(location ${target} IMPORTED_LOCATION${config})
      if(location)
        attune_archive_of("${location}" archive)
        set_target_properties(${target} PROPERTIES IMPORTED_LOCATION${config} "${archive}")
      endif()
    endforeach()
    get_target_property(links ${target} INTERFACE_LINK_LIBRARIES)
    if(links)
      set(archives "")
      foreach(link ${links})
        attune_archive_of("${link}" archive)
        list(APPEND archives "${archive}")
      endforeach()
      set_target_properties(${target} PROPERTIES INTERFACE_LINK_LIBRARIES "${archives}")
    endif()
  endforeach()
  # What shared libraries say of themselves, archives do not.
  get_target_property(uc ICU::uc IMPORTED_LOCATION)
  string(REPLACE "libicuuc" "libicudata" data "${uc}")
  set_property(TARGET ICU::uc APPEND PROPERTY INTERFACE_LINK_LIBRARIES "${data}")
  set_property(TARGET ICU::i18n APPEND PROPERTY INTERFACE_LINK_LIBRARIES ICU::uc)
endfunction()

attune_link_archives()

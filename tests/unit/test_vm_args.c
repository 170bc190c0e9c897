/* SPDX-License-Identifier: MIT */
/* The QEMU command line that options become, and the texts that options are parsed from. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include "base/bytes.h"
#include "base/err.h"
#include "vm/ssh.h"
#include "vm/vm.h"

static char *joined(const struct vm_opts *o) {
    char **argv;
    assert_int_equal(vm_args(o, &argv, NULL), 0);
    char *all = xstrdup("");
    for (char **p = argv; *p; p++) {
        char *more = xasprintf("%s %s", all, *p);
        free(all);
        all = more;
    }
    vm_args_free(argv);
    return all;
}

static void has(const struct vm_opts *o, const char *part) {
    char *all = joined(o);
    if (!strstr(all, part))
        fail_msg("no \"%s\" in:%s", part, all);
    free(all);
}
static void lacks(const struct vm_opts *o, const char *part) {
    char *all = joined(o);
    if (strstr(all, part))
        fail_msg("\"%s\" in:%s", part, all);
    free(all);
}

static const struct vm_opts plain = {.accel = VM_ACCEL_TCG, .memory = 512 * MIB, .smp = 2};

static void disk_is_virtio_over_inherited_socket(void **s) {
    struct vm_drive d = {.fd = 7};
    struct vm_opts o = plain;
    o.drives = &d;
    o.ndrives = 1;
    has(&o, " -blockdev driver=nbd,node-name=strata0,server.type=fd,server.str=7,discard=unmap,"
            "read-only=off ");
    has(&o, "virtio-blk-pci,drive=strata0,id=disk0,write-cache=on,discard=on,");
}

static void full_scratch_is_reported_to_guest_not_paused_on(void **s) {
    struct vm_drive d = {.fd = 7};
    struct vm_opts o = plain;
    o.drives = &d;
    o.ndrives = 1;
    has(&o, "werror=report,rerror=report");
}

static void cdrom_is_read_only_and_numbered_apart(void **s) {
    struct vm_drive d[] = {{.fd = 7}, {.fd = 8, .cdrom = true}, {.fd = 9}};
    struct vm_opts o = plain;
    o.drives = d;
    o.ndrives = 3;
    has(&o, "node-name=strata1,server.type=fd,server.str=8,discard=unmap,read-only=on");
    has(&o, "drive=strata1,id=cdrom0");
    has(&o, "drive=strata2,id=disk1");
}

static void vhost_user_disk_shares_the_memory_of_the_guest(void **s) {
    struct vm_drive d[] = {{.fd = 7, .queues = 2}, {.fd = 8, .cdrom = true}};
    struct vm_opts o = plain;
    lacks(&o, "memory-backend");
    o.drives = d;
    o.ndrives = 2;
    has(&o, ",memory-backend=memory ");
    has(&o, " memory-backend-memfd,id=memory,share=on,size=512M ");
    has(&o, " socket,id=strata0,fd=7 ");
    has(&o, " vhost-user-blk-pci,chardev=strata0,id=disk0,num-queues=2 ");
    has(&o, "node-name=strata1,server.type=fd,server.str=8");
}

static void no_net_means_no_card(void **s) {
    has(&plain, " -nic none");
}

static void forwards_follow_the_card(void **s) {
    struct vm_forward f[] = {{"127.0.0.1", 2222, 22}, {"0.0.0.0", 80, 8080}};
    struct vm_opts o = plain;
    o.net.kind = VM_NET_USER;
    o.forwards = f;
    o.nforwards = 2;
    has(&o, " -nic user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:2222-:22,"
            "hostfwd=tcp:0.0.0.0:80-:8080");
}

static void commas_in_user_names_stay_whole_arguments(void **s) {
    struct vm_opts o = plain;
    char **argv;
    o.kernel = "a,b=c";
    o.append = "root=/dev/vda x=1,2";
    assert_int_equal(vm_args(&o, &argv, NULL), 0);
    int seen = 0;
    for (char **p = argv; *p; p++)
        seen += !strcmp(*p, "a,b=c") + !strcmp(*p, "root=/dev/vda x=1,2");
    assert_int_equal(seen, 2);
    vm_args_free(argv);
}

static void memory_is_rounded_up_to_mib(void **s) {
    struct vm_opts o = plain;
    o.memory = 100 * MIB + 1;
    has(&o, " -m 101M ");
}

static void nographic_with_kernel_keeps_firmware_off_the_terminal(void **s) {
    struct vm_opts o = plain;
    o.nographic = true;
    has(&o, " -nographic");
    o.kernel = "vmlinuz";
    lacks(&o, " -nographic");
    has(&o, " -serial mon:stdio");
}

static void extra_arguments_come_last(void **s) {
    char *extra[] = {"-device", "isa-debug-exit", NULL};
    struct vm_opts o = plain;
    o.extra = extra;
    char *all = joined(&o);
    const char *tail = " -device isa-debug-exit";
    assert_string_equal(all + strlen(all) - strlen(tail), tail);
    free(all);
}

static void forward_parses_ports_and_address(void **s) {
    struct vm_forward f;
    assert_int_equal(vm_forward_parse("2222:22", &f, NULL), 0);
    assert_string_equal(f.addr, "127.0.0.1");
    assert_int_equal(f.host, 2222);
    assert_int_equal(f.guest, 22);
    assert_int_equal(vm_forward_parse("0.0.0.0:65535:1", &f, NULL), 0);
    assert_string_equal(f.addr, "0.0.0.0");
    assert_int_equal(f.host, 65535);
}

static void forward_refuses_what_is_not_two_ports(void **s) {
    static const char *const bad[] = {"",        "22",          ":",
                                      "22:",     ":22",         "0:22",
                                      "22:0",    "65536:1",     "1:99999",
                                      "a:1",     "1.2.3:80:80", "-1:22",
                                      "1:2:3:4", " 1:2",        "127.0.0.1,hostfwd=x:1:2"};
    struct vm_forward f;
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        struct err e AUTO_ERR = ERR_INIT;
        if (vm_forward_parse(bad[i], &f, &e) != -EINVAL)
            fail_msg("accepted '%s'", bad[i]);
        assert_non_null(e.text);
    }
}

static void memory_without_suffix_is_mib(void **s) {
    uint64_t v;
    assert_int_equal(vm_memory_parse("512", &v, NULL), 0);
    assert_int_equal(v, 512 * MIB);
    assert_int_equal(vm_memory_parse("2G", &v, NULL), 0);
    assert_int_equal(v, 2 * GIB);
}

static void memory_out_of_range_is_refused(void **s) {
    uint64_t v;
    assert_int_equal(vm_memory_parse("0", &v, NULL), -ERANGE);
    assert_int_equal(vm_memory_parse("1k", &v, NULL), -ERANGE);
    assert_int_equal(vm_memory_parse("9223372036854775807", &v, NULL), -ERANGE);
    assert_int_equal(vm_memory_parse("x", &v, NULL), -EINVAL);
}

static void vnc_without_address_stays_on_this_machine(void **s) {
    char *d = vm_vnc_display(":1");
    assert_string_equal(d, "127.0.0.1:1");
    free(d);
    d = vm_vnc_display("0.0.0.0:1");
    assert_string_equal(d, "0.0.0.0:1");
    free(d);
}

static void read_only_disk_is_read_only_to_qemu(void **s) {
    struct vm_drive d = {.fd = 7, .read_only = true};
    struct vm_opts o = plain;
    o.drives = &d;
    o.ndrives = 1;
    has(&o, "server.str=7,discard=unmap,read-only=on ");
    has(&o, "virtio-blk-pci,drive=strata0,id=disk0");
}

static void card_is_on_a_device_of_this_machine(void **s) {
    struct vm_forward f = {"127.0.0.1", 2222, 22};
    struct vm_opts o = plain;
    o.forwards = &f; /* for user networking alone */
    o.nforwards = 1;
    assert_int_equal(vm_net_parse("tap=tap0", &o.net, NULL), 0);
    has(&o, " -nic tap,ifname=tap0,script=no,downscript=no,model=virtio-net-pci");
    assert_int_equal(vm_net_parse("bridge=virbr0", &o.net, NULL), 0);
    has(&o, " -nic bridge,br=virbr0,model=virtio-net-pci");
    lacks(&o, "hostfwd");
}

static void net_parses_four_kinds(void **s) {
    struct vm_net n;
    assert_int_equal(vm_net_parse("user", &n, NULL), 0);
    assert_int_equal(n.kind, VM_NET_USER);
    assert_int_equal(vm_net_parse("none", &n, NULL), 0);
    assert_int_equal(n.kind, VM_NET_NONE);
    assert_int_equal(vm_net_parse("tap=fifteen-letters", &n, NULL), 0);
    assert_string_equal(n.name, "fifteen-letters");
}

static void net_refuses_what_is_no_device(void **s) {
    static const char *const bad[] = {"",           "usr",
                                      "tap",        "tap=",
                                      "bridge",     "user=",
                                      "none=x",     "tap=a,b",
                                      "tap=a/b",    "tap=a:b",
                                      "tap=..",     "tap=a b",
                                      "bridge=a=b", "tap=sixteen-letters-",
                                      "tap=a\nb",   "TAP=x",
                                      "=x",         "bridges=x"};
    struct vm_net n;
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        struct err e AUTO_ERR = ERR_INIT;
        if (vm_net_parse(bad[i], &n, &e) != -EINVAL)
            fail_msg("accepted '%s'", bad[i]);
        assert_non_null(e.text);
    }
}

static void monitor_listens_and_does_not_wait(void **s) {
    struct vm_monitor m;
    struct vm_opts o = plain;
    lacks(&o, "monitor");
    o.monitor = &m;
    assert_int_equal(vm_monitor_parse("unix:/a,b", &m, NULL), 0);
    assert_string_equal(m.path, "/a,b");
    m.fd = 9;
    has(&o,
        " -chardev socket,id=monitor,fd=9,server=on,wait=off -mon chardev=monitor,mode=readline");
    lacks(&o, "/a,b");
    assert_int_equal(vm_monitor_parse("telnet:localhost:23", &m, NULL), 0);
    has(&o, " socket,id=monitor,host=127.0.0.1,port=23,server=on,wait=off,telnet=on ");
    assert_int_equal(vm_monitor_parse("tcp:0.0.0.0:4444", &m, NULL), 0);
    has(&o, " socket,id=monitor,host=0.0.0.0,port=4444,server=on,wait=off,telnet=off ");
    assert_int_equal(vm_monitor_parse("stdio", &m, NULL), 0);
    has(&o, " -monitor stdio ");
}

static void monitor_elsewhere_leaves_the_one_on_the_console(void **s) {
    struct vm_monitor m;
    struct vm_opts o = plain;
    assert_int_equal(vm_monitor_parse("tcp:1", &m, NULL), 0);
    o.monitor = &m;
    o.nographic = true;
    has(&o, " -nographic -serial mon:stdio ");
}

static void monitor_refuses_other_places(void **s) {
    static const char *const bad[] = {
        "",         "vc",          "unix:",           "unix",
        "tcp:",     "tcp:0",       "tcp:65536",       "tcp:h:1",
        "telnet:x", "tcp:1.2.3:4", "tcp:1,server=on", "tcp:[::1]:5",
        "stdio:",   "udp:1",       "tcp::-1",         "tcp:1.1.1.1,x:2"};
    struct vm_monitor m;
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        struct err e AUTO_ERR = ERR_INIT;
        if (vm_monitor_parse(bad[i], &m, &e) != -EINVAL)
            fail_msg("accepted '%s'", bad[i]);
        assert_non_null(e.text);
    }
}

static void uefi_is_two_flash_chips_behind_descriptors(void **s) {
    struct vm_uefi u = {11, 12};
    struct vm_opts o = plain;
    lacks(&o, "pflash");
    o.uefi = &u;
    has(&o, ",pflash0=uefi-code,pflash1=uefi-vars ");
    has(&o, " -add-fd set=1,fd=11 -add-fd set=2,fd=12 ");
    has(&o, "node-name=uefi-code,read-only=on,file.driver=file,file.filename=/dev/fdset/1");
}

static void somebody_elses_terminal_means_no_window(void **s) {
    struct vm_opts o = plain;
    o.no_terminal = true;
    o.control_fd = 5;
    has(&o, " -display none ");
    has(&o, " -chardev socket,id=strata-control,fd=5 -mon chardev=strata-control,mode=control");
    o.vnc = "127.0.0.1:1";
    lacks(&o, "-display none");
}

static void words_are_quoted_as_a_shell_takes_them(void **s) {
    static const char *const words[][2] = {{"a-b_c=d,e:/f@g%h+.", "a-b_c=d,e:/f@g%h+."},
                                           {"", "''"},
                                           {"a b", "'a b'"},
                                           {"$x`y`*~", "'$x`y`*~'"},
                                           {"it's", "'it'\\''s'"},
                                           {"\n", "'\n'"}};
    for (size_t i = 0; i < sizeof(words) / sizeof(*words); i++) {
        char *q = vm_quote(words[i][0]);
        assert_string_equal(q, words[i][1]);
        free(q);
    }
}

static void session_asks_nobody_about_the_host_key(void **s) {
    char **a = vm_ssh_args(2222, "root");
    const char *want[] = {"ssh",
                          "-o",
                          "StrictHostKeyChecking=no",
                          "-o",
                          "UserKnownHostsFile=/dev/null",
                          "-o",
                          "LogLevel=ERROR",
                          "-p",
                          "2222",
                          "-l",
                          "root",
                          "127.0.0.1"};
    for (size_t i = 0; i < sizeof(want) / sizeof(*want); i++)
        assert_string_equal(a[i], want[i]);
    assert_null(a[sizeof(want) / sizeof(*want)]);
    vm_args_free(a);
}

static void free_port_is_outside_those_of_outgoing_connections(void **s) {
    uint16_t port;
    assert_int_equal(vm_free_port(&port, NULL), 0);
    assert_true(port >= 20000 && port < 32768);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(disk_is_virtio_over_inherited_socket),
        cmocka_unit_test(full_scratch_is_reported_to_guest_not_paused_on),
        cmocka_unit_test(cdrom_is_read_only_and_numbered_apart),
        cmocka_unit_test(vhost_user_disk_shares_the_memory_of_the_guest),
        cmocka_unit_test(no_net_means_no_card),
        cmocka_unit_test(forwards_follow_the_card),
        cmocka_unit_test(commas_in_user_names_stay_whole_arguments),
        cmocka_unit_test(memory_is_rounded_up_to_mib),
        cmocka_unit_test(nographic_with_kernel_keeps_firmware_off_the_terminal),
        cmocka_unit_test(extra_arguments_come_last),
        cmocka_unit_test(forward_parses_ports_and_address),
        cmocka_unit_test(forward_refuses_what_is_not_two_ports),
        cmocka_unit_test(memory_without_suffix_is_mib),
        cmocka_unit_test(memory_out_of_range_is_refused),
        cmocka_unit_test(vnc_without_address_stays_on_this_machine),
        cmocka_unit_test(read_only_disk_is_read_only_to_qemu),
        cmocka_unit_test(card_is_on_a_device_of_this_machine),
        cmocka_unit_test(net_parses_four_kinds),
        cmocka_unit_test(net_refuses_what_is_no_device),
        cmocka_unit_test(monitor_listens_and_does_not_wait),
        cmocka_unit_test(monitor_elsewhere_leaves_the_one_on_the_console),
        cmocka_unit_test(monitor_refuses_other_places),
        cmocka_unit_test(uefi_is_two_flash_chips_behind_descriptors),
        cmocka_unit_test(somebody_elses_terminal_means_no_window),
        cmocka_unit_test(words_are_quoted_as_a_shell_takes_them),
        cmocka_unit_test(session_asks_nobody_about_the_host_key),
        cmocka_unit_test(free_port_is_outside_those_of_outgoing_connections),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

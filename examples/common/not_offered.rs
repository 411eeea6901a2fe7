//! What a daemon does not offer: vhost's handler has a method for each message.

/// Methods of `VhostUserBackendReqHandlerMut` that refuse, by their names, or by those of groups
/// of them. vhost's module `message` is to be in scope.
macro_rules! not_offered {
    ($($method:ident),*) => { $(not_offered!(@$method);)* };
    (@features) => {
        fn get_features(&mut self) -> vhost::vhost_user::Result<u64> {
            Ok(0)
        }
        not_offered!(set_owner, reset_owner, reset_device, set_features, get_queue_num);
        not_offered!(get_protocol_features, set_protocol_features);
    };
    (@slots) => { not_offered!(get_max_mem_slots, add_mem_region, remove_mem_region); };
    (@rings) => {
        not_offered!(set_vring_num, set_vring_addr, set_vring_base, get_vring_base);
        not_offered!(set_vring_kick, set_vring_call, set_vring_err, set_vring_enable);
    };
    (@others) => {
        not_offered!(get_config, set_config, set_log_base, set_gpu_socket, get_shared_object);
        not_offered!(get_inflight_fd, set_inflight_fd, set_device_state_fd, check_device_state);
        not_offered!(get_shmem_config);
    };
    (@set_owner) => { not_offered!(fn set_owner() -> ()); };
    (@reset_owner) => { not_offered!(fn reset_owner() -> ()); };
    (@reset_device) => { not_offered!(fn reset_device() -> ()); };
    (@set_features) => { not_offered!(fn set_features(u64) -> ()); };
    (@get_protocol_features) => {
        not_offered!(fn get_protocol_features() -> message::VhostUserProtocolFeatures);
    };
    (@set_protocol_features) => { not_offered!(fn set_protocol_features(u64) -> ()); };
    (@get_max_mem_slots) => { not_offered!(fn get_max_mem_slots() -> u64); };
    (@add_mem_region) => {
        not_offered!(fn add_mem_region(
            &message::VhostUserSingleMemoryRegion, std::fs::File, Option<bool>
        ) -> Option<u64>);
    };
    (@remove_mem_region) => {
        not_offered!(fn remove_mem_region(&message::VhostUserSingleMemoryRegion) -> ());
    };
    (@set_vring_num) => { not_offered!(fn set_vring_num(u32, u32) -> ()); };
    (@set_vring_addr) => {
        not_offered!(fn set_vring_addr(
            u32, message::VhostUserVringAddrFlags, u64, u64, u64, u64
        ) -> ());
    };
    (@set_vring_base) => { not_offered!(fn set_vring_base(u32, u32) -> ()); };
    (@get_vring_base) => { not_offered!(fn get_vring_base(u32) -> message::VhostUserVringState); };
    (@set_vring_kick) => { not_offered!(fn set_vring_kick(u8, Option<std::fs::File>) -> ()); };
    (@set_vring_call) => { not_offered!(fn set_vring_call(u8, Option<std::fs::File>) -> ()); };
    (@set_vring_err) => { not_offered!(fn set_vring_err(u8, Option<std::fs::File>) -> ()); };
    (@set_vring_enable) => { not_offered!(fn set_vring_enable(u32, bool) -> ()); };
    (@get_queue_num) => { not_offered!(fn get_queue_num() -> u64); };
    (@get_config) => {
        not_offered!(fn get_config(u32, u32, message::VhostUserConfigFlags) -> Vec<u8>);
    };
    (@set_config) => {
        not_offered!(fn set_config(u32, &[u8], message::VhostUserConfigFlags) -> ());
    };
    (@set_gpu_socket) => { not_offered!(fn set_gpu_socket(vhost::vhost_user::GpuBackend) -> ()); };
    (@get_shared_object) => {
        not_offered!(fn get_shared_object(message::VhostUserSharedMsg) -> std::fs::File);
    };
    (@get_inflight_fd) => {
        not_offered!(fn get_inflight_fd(
            &message::VhostUserInflight
        ) -> (message::VhostUserInflight, std::fs::File));
    };
    (@set_inflight_fd) => {
        not_offered!(fn set_inflight_fd(&message::VhostUserInflight, std::fs::File) -> ());
    };
    (@set_device_state_fd) => {
        not_offered!(fn set_device_state_fd(
            message::VhostTransferStateDirection, message::VhostTransferStatePhase, std::fs::File
        ) -> Option<std::fs::File>);
    };
    (@check_device_state) => { not_offered!(fn check_device_state() -> ()); };
    (@get_shmem_config) => {
        not_offered!(fn get_shmem_config() -> message::VhostUserShMemConfig);
    };
    (@set_log_base) => {
        not_offered!(fn set_log_base(&message::VhostUserLog, std::fs::File) -> ());
    };
    (fn $method:ident($($arg:ty),*) -> $answer:ty) => {
        fn $method(&mut self, $(_: $arg),*) -> vhost::vhost_user::Result<$answer> {
            Err(vhost::vhost_user::Error::InvalidOperation("not offered"))
        }
    };
}

pub(crate) use not_offered;

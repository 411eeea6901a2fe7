//! `AddressSpace`: what its listeners and readers hold when a change happens, or does not.

mod matrix;
mod matrix_case;
mod matrix_hypervisor;
mod matrix_kvm;
mod matrix_log;
mod matrix_member;
mod matrix_model;
mod matrix_process;
mod matrix_relay;
mod matrix_restart;
mod matrix_sample;
mod matrix_server;
mod matrix_session;
mod matrix_world;
